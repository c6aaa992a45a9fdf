"""What computes the experts of a training run, by name (`train.expert_backend`). A backend is not part of a model, so
exports leave this file behind.

All backends get rows that are sorted by expert, so each serves every dispatcher and every mesh, and the weighting and
summing of a token's rows stay kmem's, in a fixed order.
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
    """The backend, loaded. Whether it runs on a device is for `problem` to say.

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
    """The backends that run here with rows of this type."""
    return [name for name in NAMES if problem(name, device, dtype) is None]


def problem(name: BackendName, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not run on a device with rows of this type, and the remedy; None if it does."""
    if name in ("grouped_mm", "loop"):
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return (
                f"it needs a GPU of compute capability 8.0 or more, and {device} has {'.'.join(map(str, capability))}"
            )
        if dtype != torch.bfloat16:
            return "on a GPU it would multiply fp32 in TF32: set train.precision=bf16"
    elif not _interpreted():
        return f"it needs a CUDA device, and this process computes on the {device.type}"
    elif dtype != torch.float32:  # the interpreter multiplies the bit patterns of bf16 (triton issue 11584)
        return "in Triton's interpreter it is right in fp32 alone"
    package, remedy = _PACKAGES[name]
    if importlib.util.find_spec("triton") is None:  # DeepSpeed's module can be imported without
        return f"it needs triton, which is not installed: {remedy}"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        return f"it needs {package}, which cannot be imported ({error}): {remedy}"
    if not getattr(module, "_TRITON_AVAILABLE", True):
        return (
            "DeepSpeed has its kernels only where Triton finds a GPU, and when it was imported there was none: check "
            "CUDA_VISIBLE_DEVICES and the driver"
        )
    return None


def loop(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
    """Expert by expert: the definition of every backend."""
    counts = counts_E.tolist()
    assert sum(counts) == len(rows_NH), f"{sum(counts)} rows counted, {len(rows_NH)} given"
    # unbind, so that the gradients of all experts are stacked once; without any row the first expert sees none.
    parts = [
        F.linear(swiglu(F.linear(rows, gate_up)), down)
        for rows, gate_up, down in zip(rows_NH.split(counts), gate_up_proj.unbind(), down_proj.unbind(), strict=True)
        if len(rows) or not len(rows_NH)
    ]
    return torch.cat(parts)


_PACKAGES = {
    "deepspeed": ("deepspeed.ops.triton_ops.group_gemm_triton", "pip install 'kmem[kernels]'"),
    "liger": ("liger_kernel.ops.fused_moe", "pip install 'kmem[liger]'"),
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
    # It could also gather a token's rows and sum them up, but adds the gradients of the routing weights by atomics in
    # the rows' dtype, in no fixed order. Here every row is a token of its own, whose weight of 1 has no gradient.
    _triton_module("liger_kernel.ops.fused_moe_kernels")
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def liger(rows_NH: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts_E: Tensor) -> Tensor:
        experts = torch.arange(len(counts_E), dtype=torch.int32, device=rows_NH.device)
        expert_N1 = experts.repeat_interleave(counts_E, output_size=len(rows_NH)).unsqueeze(1)
        return function.apply(rows_NH, gate_up_proj, down_proj, expert_N1, rows_NH.new_ones(len(rows_NH), 1))

    return liger


def _triton_module(name: str) -> Any:
    """A module of kernels. Their tilings are chosen by time on a GPU; the interpreter takes the first of each."""
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
