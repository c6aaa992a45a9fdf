"""Chooses the implementation of an operation, and tells whether Triton compiles or interprets.

Every op imports this module; without Triton, the import raises ImportError.
"""

from importlib.util import find_spec
from typing import Literal

from torch import Tensor

if find_spec("triton") is None:
    raise ImportError("kmem_kernels needs Triton: pip install 'triton>=3.6'")

Backend = Literal["triton", "torch"]


def chosen(backend: Backend | None, tensor: Tensor) -> Backend:
    """The given backend, or by default `triton` for CUDA tensors and otherwise `torch`, the definition.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is `triton`, which cannot run on the tensor's device.
    """
    if backend is None:
        return "triton" if tensor.is_cuda else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend {backend!r} is not one of 'triton', 'torch'")
    if backend == "triton" and not tensor.is_cuda and not interpreted():
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
