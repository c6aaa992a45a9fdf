"""Which implementation of an operation runs, and whether Triton compiles or interprets.

Importing this, as every op does, without Triton raises ImportError.
"""

from importlib.util import find_spec
from typing import Literal

from torch import Tensor

if find_spec("triton") is None:
    raise ImportError("kmem_kernels needs Triton: pip install 'kmem[kernels]'")

Backend = Literal["triton", "torch"]


def chosen(backend: Backend | None, tensor: Tensor) -> Backend:
    """The backend that was asked for; without a wish `triton` for CUDA tensors, else `torch`, the definition.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: Triton was asked for and cannot run on the tensor's device.
    """
    if backend is None:
        return "triton" if tensor.is_cuda else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend {backend!r} is none of 'triton', 'torch'")
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise RuntimeError(
            f"the Triton backend runs on CUDA tensors and this one is on {tensor.device}: use backend='torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    return backend


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. A program takes about a millisecond there, whatever its size, so
    launches choose larger blocks than on a GPU."""
    from triton import knobs  # a CPU run does without Triton

    return bool(knobs.runtime.interpret)
