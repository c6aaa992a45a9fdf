"""The choice of the largest values: both ways to make it agree, and order what is equal by index."""

import pytest
import torch

from kmem.model import router
from kmem.model.router import stable_top_k

INFINITE = float("inf")


def both(values, k, monkeypatch):
    """What passes over the values choose, and what packed integers choose."""
    found = []
    for passes in (values.shape[-1], 0):
        monkeypatch.setattr(router, "MOST_MAXIMA", passes)
        found.append(stable_top_k(values, k))
    return found


def sample(dtype, distinct):
    """[7, 3, 40] values of both signs, of which many are equal."""
    values = torch.randn(7, 3, 40, generator=torch.Generator().manual_seed(0))
    return ((values * distinct).round() / distinct).to(dtype)


@pytest.mark.parametrize("distinct", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ways_agree_for_every_number_of_choices(dtype, distinct, monkeypatch):
    values = sample(dtype, distinct)
    assert (values == 0).any() == (distinct == 1)
    for k in range(1, values.shape[-1] + 1):
        passes, packed = both(values, k, monkeypatch)
        assert packed.dtype == torch.int64
        assert torch.equal(packed, passes)
        assert torch.equal(packed, values.sort(dim=-1, descending=True, stable=True).indices[..., :k])


@pytest.mark.parametrize("strided", [False, True])
def test_values_that_are_views(strided, monkeypatch):
    wide = sample(torch.float32, 1)
    values = wide.transpose(0, 2) if strided else wide[:, :1].expand(-1, 5, -1)
    passes, packed = both(values, values.shape[-1], monkeypatch)
    assert torch.equal(packed, passes)


def test_zeros_are_equal_whatever_their_signs(monkeypatch):
    values = torch.tensor([-1.0, -0.0, 0.0, 1.0, -0.0, 0.0])
    for found in both(values, 6, monkeypatch):
        assert found.tolist() == [3, 1, 2, 4, 5, 0]


def test_infinite_values(monkeypatch):
    """Values that stand for what must not be chosen come last; the packed way never chooses one twice."""
    values = torch.tensor([-INFINITE, 3.0, -INFINITE, INFINITE, -2.0, -INFINITE, 3.0])
    for k in range(1, 5):
        passes, packed = both(values, k, monkeypatch)
        assert torch.equal(packed, passes)
    assert both(values, 4, monkeypatch)[1].tolist() == [3, 1, 6, 4]
    monkeypatch.setattr(router, "MOST_MAXIMA", 0)
    assert stable_top_k(values, 7).tolist() == [3, 1, 6, 4, 0, 2, 5]


def test_doubles_are_not_rounded():
    values = 1 + torch.arange(12, dtype=torch.float64) * 2.0**-40
    assert stable_top_k(values, 10).tolist() == list(range(11, 1, -1))
