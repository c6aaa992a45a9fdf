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
