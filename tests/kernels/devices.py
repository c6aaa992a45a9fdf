"""The same kernel tests run interpreted on the CPU and, where there is one, compiled on a GPU."""

import pytest
import torch

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same cases")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
