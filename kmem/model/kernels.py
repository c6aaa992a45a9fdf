"""The Triton kernels, where `kmem_kernels` is installed: an exported model brings this folder alone."""

from torch import Tensor

try:
    import kmem_kernels.ngram_ids.op
    import kmem_kernels.permute.op
    import kmem_kernels.route.op
    import kmem_kernels.swiglu.op
except ImportError:
    kmem_kernels = None  # type: ignore[assignment]


def kernels_serve(tensor: Tensor) -> bool:
    """Whether kernels compute with this tensor; torch computes the same."""
    return kmem_kernels is not None and tensor.is_cuda
