"""The rotation of heads against its definition, and against the model's own on a CPU."""

import pytest
import torch

from kmem.model import rope
from kmem.model.rope import Rotation, rotate
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.rotary.op import rotate as rotate_heads

SIZES = [(1, 1, 2, 1), (5, 3, 16, 8), (7, 2, 24, 5), (65, 4, 40, 20)]  # tokens, heads, width, rotated pairs


def angles_of(tokens, width, half, device="cpu"):
    angles = torch.arange(tokens)[:, None] * random(1, half).exp()
    rest = torch.ones(tokens, width - 2 * half)
    return torch.cat((angles.cos(), angles.cos(), rest), 1).to(device), angles.sin().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, heads, width, half", SIZES)
def test_values_and_gradients(tokens, heads, width, half, dtype, device):
    cos, sin = angles_of(tokens, width, half, device)
    whole = random(tokens, heads, width + 3, dtype=dtype).to(device).requires_grad_()
    grad = random(heads, tokens, width, seed=1, dtype=dtype).to(device).transpose(0, 1)  # as attention gives it
    found, wanted = [], []
    for results, x, backend in ((found, whole, "triton"), (wanted, whole.detach().double().requires_grad_(), "torch")):
        out = rotate_heads(x[..., 3:], cos.to(x.dtype) if backend == "torch" else cos, sin, backend=backend)
        results += [out.detach(), *torch.autograd.grad(out, x, grad.to(out.dtype))]
    within = 1e-6 if dtype == torch.float32 else 2**-7
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, atol=within * 4, rtol=within)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_models_rotation(rows, device, monkeypatch):
    """Positions may be the same for all sequences."""
    results = []
    for served in (True, False):
        monkeypatch.setattr(rope, "kernels_serve", lambda _, served=served: served)
        cos, sin = (part.unflatten(0, (rows, -1)).unsqueeze(2) for part in angles_of(rows * 6, 16, 4, device))
        x = random(2, 6, 3, 16).to(device).requires_grad_()
        out = rotate(x, Rotation(cos, sin))
        results.append([out.detach(), *torch.autograd.grad(out, x, random(2, 6, 3, 16, seed=1).to(device))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_refusals():
    with pytest.raises(ValueError, match=r"cosines \(2, 6\) and sines \(2, 4\) do not fit heads \(2, 3, 6\)"):
        rotate_heads(random(2, 3, 6), random(2, 6), random(2, 4))
    with pytest.raises(TypeError, match="fp64"):
        rotate_heads(random(2, 3, 6).double(), random(2, 6), random(2, 3), backend="triton")
