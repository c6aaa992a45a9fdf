"""The loss of logits against its definition, and the model's loss with and without the kernel."""

import pytest
import torch
import torch.nn.functional as F

from kmem.model import loss
from kmem.model.loss import linear_cross_entropy
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.cross_entropy import triton as kernels
from kmem_kernels.cross_entropy.op import cross_entropy_
from kmem_kernels.cross_entropy.reference import IGNORED

SIZES = [(1, 1), (3, 40), (7, 1000), (2, 5003)]  # tokens, vocabulary


def labels_of(tokens, vocabulary, device):
    labels = torch.arange(tokens) * 7919 % vocabulary
    labels[::3] = IGNORED
    labels[-1] = vocabulary - 1
    return labels.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, vocabulary", SIZES)
def test_losses_and_gradients(tokens, vocabulary, dtype, device):
    logits, labels = (5 * random(tokens, vocabulary, dtype=dtype)).to(device), labels_of(tokens, vocabulary, device)
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    for backend in ("triton", "torch"):
        found = logits.clone()
        losses = cross_entropy_(found, labels, backend=backend)
        torch.testing.assert_close(losses.double(), wanted.detach(), atol=1e-5, rtol=1e-5)
        within = 1e-6 if dtype == torch.float32 else 2**-7  # the interpreter cuts bits off
        torch.testing.assert_close(found.double(), gradient, atol=within * 0.1, rtol=within * 10)
        assert not found[labels == IGNORED].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_extreme_logits(device, monkeypatch):
    """Many blocks of one row, of which some hold nothing that counts; no overflow; a number that is none is seen."""
    if device == "cpu":
        monkeypatch.setattr(kernels, "interpreted", lambda: False)
        monkeypatch.setattr(kernels, "BLOCK", 16)
    logits = torch.full((3, 100), -torch.inf)
    logits[0, 40], logits[0, 99] = 1e30, 1e30
    logits[1] = torch.linspace(-1e4, 1e4, 100)
    logits[2, 5] = torch.nan
    found = logits.to(device)
    losses = cross_entropy_(found, torch.tensor([99, 0, 5], device=device), backend="triton").cpu()
    torch.testing.assert_close(losses[:2], torch.tensor([0.6931472, 2e4]))
    assert losses[2].isnan()
    assert found[0].cpu().nonzero().flatten().tolist() == [40, 99]
    assert found[0, 40] == 0.5
    assert found[0, 99] == -0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [64, 3])
def test_the_models_loss(chunk, device, monkeypatch):
    monkeypatch.setattr(loss, "_chunk_rows", lambda _: chunk)
    results = []
    for served in (True, False):
        monkeypatch.setattr(loss, "kernels_serve", lambda _, served=served: served)
        hidden, weight = (random(*size, seed=size[0]).to(device).requires_grad_() for size in ((2, 4, 16), (50, 16)))
        total = linear_cross_entropy(hidden, weight, labels_of(8, 50, device).view(2, 4))
        results.append([total.detach(), *torch.autograd.grad(3 * total, [hidden, weight])])
        with torch.no_grad():
            assert linear_cross_entropy(hidden, weight, labels_of(8, 50, device).view(2, 4)) == results[-1][0]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match=r"labels \(3,\) do not fit contiguous logits \(2, 5\)"):
        cross_entropy_(random(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_(random(5, 2).T, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="fp64"):
        cross_entropy_(random(2, 5).double(), torch.zeros(2, dtype=torch.int64), backend="triton")
