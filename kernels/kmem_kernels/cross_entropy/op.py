"""Cross entropy of logits, whose memory gets the gradient (the idea of Liger-Kernel's, arXiv 2410.10989)."""

import torch
from torch import Tensor

from ..backend import Backend, chosen
from . import reference

# Shape letters: N tokens, V vocabulary.


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, backend: Backend | None = None) -> Tensor:
    """The cross entropy of each token, fp32 [N], 0 where the label is -100. Outside autograd.

    Args:
        logits_NV: any float dtype, contiguous; overwritten with the gradient of the losses' sum, computed in fp32.
        labels_N: int64, below V, or -100.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: there is not one label for each row.
        TypeError: the Triton backend was given fp64.
    """
    if labels_N.shape != logits_NV.shape[:1] or not logits_NV.is_contiguous():
        raise ValueError(f"labels {tuple(labels_N.shape)} do not fit contiguous logits {tuple(logits_NV.shape)}")
    if chosen(backend, logits_NV) == "torch":
        return reference.cross_entropy_(logits_NV, labels_N)
    if logits_NV.dtype == torch.float64:
        raise TypeError("the Triton backend computes in fp32, but was given fp64")
    from .triton import cross_entropy_ as kernel

    return kernel(logits_NV, labels_N)
