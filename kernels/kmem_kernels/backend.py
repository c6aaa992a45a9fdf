"""Chooses the implementation of an operation, tells whether Triton compiles or interprets, and makes launches known
to PyTorch.

Every op imports this module; without Triton, the import raises ImportError.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

if find_spec("triton") is None:
    raise ImportError("kmem_kernels needs Triton: pip install 'triton>=3.6'")

Backend = Literal["triton", "torch"]


def chosen(backend: Backend | None, tensor: Tensor) -> Backend:
    """The given backend, or by default `triton` for CUDA tensors and otherwise `torch`, the definition.

    Meta tensors may have either: for them, no kernel is launched.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is `triton`, which cannot run on the tensor's device.
    """
    if backend is None:
        return "triton" if tensor.is_cuda else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend {backend!r} is not one of 'triton', 'torch'")
    if backend == "triton" and not (tensor.is_cuda or tensor.is_meta or interpreted()):
        raise RuntimeError(
            f"the Triton backend needs CUDA tensors, but this one is on {tensor.device}: use backend='torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    return backend


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. There a program takes about a millisecond, whatever its size, so
    launches choose larger blocks than on a GPU."""
    from triton import knobs  # a CPU run does not need Triton

    return bool(knobs.runtime.interpret)


_library = torch.library.Library("kmem_kernels", "DEF")
_shapes_alone: ContextVar[bool] = ContextVar("shapes_alone", default=False)


def operator(launch: Callable[..., Any] | None = None, *, mutates: Sequence[str] = ()) -> Callable[..., Any]:
    """Make a function that allocates outputs and launches kernels an operator of PyTorch, `kmem_kernels::<its name>`.

    So it is one step to whatever watches or traces operators, such as profilers and torch.compile. For meta and fake
    tensors, the function runs without launching: see `launching`. Its parameters and results need the types of an
    operator's schema. `mutates`: names of the parameters that it changes.
    """
    if launch is None:
        return partial(operator, mutates=mutates)
    name = launch.__name__
    _library.define(name + torch.library.infer_schema(launch, mutates_args=mutates))
    for key in ("CUDA", "CPU"):
        _library.impl(name, launch, key)

    def shapes(*arguments: Any) -> Any:
        token = _shapes_alone.set(True)
        try:
            return launch(*arguments)
        finally:
            _shapes_alone.reset(token)

    torch.library.register_fake(f"kmem_kernels::{name}", shapes, lib=_library)
    return getattr(torch.ops.kmem_kernels, name).default


def launching(tensor: Tensor) -> bool:
    """Whether the kernels that compute `tensor` are to be launched: it has values, and they are not imagined."""
    return tensor.numel() > 0 and not _shapes_alone.get()


# Tilings of kernels over [N, M, D]: N tokens, M branches, D hidden size.


def row_tiling(streams: Tensor, most: int = 8) -> dict[str, int]:
    """For kernels with one token of streams [N, M, D] per program. Each thread holds the same values of every branch,
    at most 16 bytes or `most` values, so that sums over branches stay within a thread."""
    _, branches, hidden = streams.shape
    per_warp = 32 * min(16 // streams.element_size(), most)
    warps = 1 if interpreted() or hidden <= per_warp else 2
    return {
        "M": branches,
        "HIDDEN": hidden,
        "Q": _power(branches),
        "BLOCK_HIDDEN": _power(hidden) if interpreted() else per_warp * warps,
        "num_warps": warps,
    }


def block_tiling(streams: Tensor, most: int = 4) -> tuple[tuple[int, int], int, dict[str, int]]:
    """For kernels that walk a block of tokens of streams [N, M, D] for some columns of all branches, and sum over the
    tokens: the grid (column blocks, token blocks), the tokens of a block, and the tiling."""
    tiling = row_tiling(streams, most)
    block = 64
    return (-(-streams.shape[2] // tiling["BLOCK_HIDDEN"]), max(1, -(-len(streams) // block))), block, tiling


def _power(number: int) -> int:
    """The smallest power of two that is at least as large."""
    return 1 << (number - 1).bit_length()
