"""The Triton kernels, if `kmem_kernels` is installed. Exported models work without it: they ship only this folder."""

from torch import Tensor

try:
    import kmem_kernels.cross_entropy.op
    import kmem_kernels.engram_convolution.op
    import kmem_kernels.engram_gate.op
    import kmem_kernels.hyper_connection.op
    import kmem_kernels.ngram_ids.op
    import kmem_kernels.permute.op
    import kmem_kernels.rotary.op
    import kmem_kernels.route.op
    import kmem_kernels.swiglu.op
except ImportError:
    kmem_kernels = None  # type: ignore[assignment]


def kernels_serve(tensor: Tensor) -> bool:
    """Whether the kernels compute with this tensor; otherwise torch computes the same. Meta tensors stand for those of
    a GPU."""
    return kmem_kernels is not None and (tensor.is_cuda or tensor.is_meta)
