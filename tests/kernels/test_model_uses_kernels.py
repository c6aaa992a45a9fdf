"""A layer whose router, dispatcher and experts call the kernels equals the layer in torch, balance losses included."""

import pytest
import torch

from kmem.model import dispatcher, kernels, matmul, router, swiglu
from kmem.model.chain_of_experts import ChainOfExperts
from kmem.model.moe import MoE
from tests.kernels.devices import DEVICES
from tests.model import tiny

pytest.importorskip("triton")

LAYERS = {
    "softmax": {**tiny.SOFTMAX, **tiny.LOSSES},
    "sigmoid, bias, groups, shared": {**tiny.SIGMOID, **tiny.GROUPS, **tiny.LOSSES, "num_shared_experts": 1},
    "no losses": {**tiny.SOFTMAX, "num_experts": 6, "top_k": 3, "renormalize": False},
    "chain": {**tiny.SOFTMAX, **tiny.LOSSES, "chain": {"iterations": 2}},
}


def run(moe, device, monkeypatch, served):
    """Output, statistics and all gradients of a layer; the same weights every time."""
    calls = []

    def serves(tensor):
        calls.append(tensor)
        return served

    for module in (router, dispatcher, swiglu):
        monkeypatch.setattr(module, "kernels_serve", serves)
    monkeypatch.setattr(matmul, "_USE_ONEDNN", False)  # the experts as on a GPU
    layer = tiny.randomise_((ChainOfExperts if "chain" in moe else MoE)(tiny.shape(tiny.GQA, moe))).to(device)
    observed = []
    layer.on_routing = observed.append
    hidden = tiny.random(2, 19, 32).to(device).requires_grad_()
    out = layer(hidden, 2 * hidden) if "chain" in moe else layer(hidden)
    inputs = [hidden, *layer.parameters()]
    grads = torch.autograd.grad(out, inputs, tiny.random(2, 19, 32, seed=3).to(device))
    assert len(calls) >= 5  # route, sort, permute, the experts' activation, combine
    numbers = [value for statistics in observed for value in vars(statistics).values() if torch.is_tensor(value)]
    return [tensor.cpu() for tensor in (out.detach(), *grads, *numbers)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_with_kernels_equals_the_layer_in_torch(kind, device, monkeypatch):
    moe = LAYERS[kind]
    ours = run(moe, device, monkeypatch, served=True)
    for found, wanted in zip(ours, run(moe, device, monkeypatch, served=False), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_kernels_serve_no_cpu():
    """Meta tensors stand for those of a GPU: what it will have to do is counted with them."""
    assert kernels.kmem_kernels is not None
    assert not kernels.kernels_serve(torch.zeros(2, 2))
    assert kernels.kernels_serve(torch.zeros(2, 2, device="meta"))


@pytest.mark.gpu
def test_a_layer_on_a_gpu_is_repeatable():
    layer = tiny.randomise_(MoE(tiny.shape(tiny.GQA, LAYERS["softmax"]))).to("cuda", torch.bfloat16)
    results = []
    for _ in range(2):
        hidden = tiny.random(2, 19, 32).to("cuda", torch.bfloat16).requires_grad_()
        results.append(torch.autograd.grad(layer(hidden).float().square().sum(), [hidden, *layer.parameters()]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
