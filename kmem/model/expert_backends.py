"""The backends that compute the experts of a training run, by name (`train.expert_backend`). A backend is not part of a
model, so exports do not contain this file.

All backends get rows sorted by expert, so each works with every dispatcher and every mesh. kmem itself weights and sums
the rows of a token, in a fixed order.
"""

import importlib
import importlib.util
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import ExpertBackend, grouped_mm
from .swiglu import swiglu

# Shape letters: N rows, E experts held here, H hidden size, I width of an expert.

BackendName = Literal["grouped_mm", "loop", "deepspeed", "liger"]
NAMES: tuple[BackendName, ...] = get_args(BackendName)


def find_backend(name: str) -> ExpertBackend:
    """Load a backend by name. `problem` tells whether it runs on a device.

    Raises:
        ValueError: the name is unknown.
        ImportError: its package is missing.
    """
    if name == "grouped_mm":
        return grouped_mm
    if name == "loop":
        return loop
    if name == "deepspeed":
        return _deepspeed()
    if name == "liger":
        return _liger()
    raise ValueError(f"expert backend {name!r} is none of {', '.join(NAMES)}")


def available(device: torch.device, dtype: torch.dtype) -> list[BackendName]:
    """The backends that run on this device with rows of this dtype."""
    return [name for name in NAMES if problem(name, device, dtype) is None]


def problem(name: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not run on a device with rows of this dtype, and the remedy; None if it runs."""
    if name in ("grouped_mm", "loop"):
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (
                f"it needs a GPU of compute capability 8.0 or more, but {device} has {'.'.join(map(str, capability))}"
            )
        if dtype != torch.bfloat16:
            return "on a GPU it would multiply fp32 in TF32: set train.precision=bf16"
    elif not _interpreted():
        return f"it needs a CUDA device, but this process computes on the {device.type}"
    elif dtype != torch.float32:  # the interpreter multiplies the bit patterns of bf16 (triton issue 11584)
        return "in Triton's interpreter it is correct in fp32 only"
    package, remedy = _PACKAGES[name]
    if importlib.util.find_spec("triton") is None:  # DeepSpeed's module can be imported without Triton
        return f"it needs triton, which is not installed: {remedy}"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        return f"it needs {package}, which cannot be imported ({error}): {remedy}"
    if not getattr(module, "_TRITON_AVAILABLE", True):
        return (
            "DeepSpeed enables its kernels only if Triton finds a GPU, and it found none when DeepSpeed was imported: "
            "check CUDA_VISIBLE_DEVICES and the driver"
        )
    return None


def loop(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
    """One expert at a time: the definition that every backend must match."""
    counts = counts_E.tolist()
    assert sum(counts) == len(rows_NH), f"{sum(counts)} rows counted, {len(rows_NH)} given"
    # unbind, so that the gradients of all experts are stacked once. Without any rows, every expert gets an empty batch.
    parts = [
        F.linear(swiglu(F.linear(rows, gate_up)), down)
        for rows, gate_up, down in zip(rows_NH.split(counts), gate_up_proj.unbind(), down_proj.unbind(), strict=True)
        if len(rows) or not len(rows_NH)
    ]
    return torch.cat(parts)


_PACKAGES = {
    "deepspeed": ("deepspeed.ops.triton_ops.group_gemm_triton", "pip install 'triton>=3.6'"),
    "liger": ("liger_kernel.ops.fused_moe", "pip install 'liger-kernel>=0.8.5,<0.9'"),
}


def _deepspeed() -> ExpertBackend:
    product = _triton_module("deepspeed.ops.triton_ops.group_gemm_triton").group_gemm_triton

    def deepspeed(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
        largest = len(rows_NH) * max(rows_NH.shape[1], gate_up_proj.shape[1])
        assert largest < 2**31, f"DeepSpeed's kernels count {largest} elements in 32 bits: lower train.micro_batch_size"
        ends = counts_E.cumsum(0, dtype=torch.int32)
        return product(swiglu(product(rows_NH, gate_up_proj, ends, True)), down_proj, ends, True)

    return deepspeed


def _liger() -> ExpertBackend:
    # Liger could also gather and sum a token's rows, but it adds the gradients of the routing weights by atomics, in
    # the rows' dtype and in no fixed order. So every row is passed as one token with weight 1, which has no gradient.
    _triton_module("liger_kernel.ops.fused_moe_kernels")
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def liger(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
        experts = torch.arange(len(counts_E), dtype=torch.int32, device=rows_NH.device)
        expert_N1 = experts.repeat_interleave(counts_E, output_size=len(rows_NH)).unsqueeze(1)
        return function.apply(rows_NH, gate_up_proj, down_proj, expert_N1, rows_NH.new_ones(len(rows_NH), 1))

    return liger


def _triton_module(name: str) -> Any:
    """A module of kernels. On a GPU, Triton tunes their tilings; in the interpreter, each kernel keeps its first
    one."""
    module = importlib.import_module(name)
    if _interpreted():
        from triton.runtime.autotuner import Autotuner

        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                del kernel.configs[1:]
    return module


def _interpreted() -> bool:
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
