"""The kernels of an engram layer, its gate and its convolution, against their definitions and the model's own code."""

import pytest
import torch
from torch.autograd import gradcheck

from kmem.model import engram
from kmem.model.engram import Engram, EngramInput
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels import tiling
from kmem_kernels.engram_convolution.op import convolved
from kmem_kernels.engram_gate.op import branch_gate

EPS = 1e-5


def bf16(*size, seed=0):
    """Numbers that every dtype holds."""
    return random(*size, seed=seed, dtype=torch.bfloat16)


def gate_results(tensors, name):
    out, gate = branch_gate(*tensors, EPS, backend=name)
    grads = torch.autograd.grad(out, tensors, bf16(*out.shape, seed=9).to(out))
    return [x.detach().cpu() for x in (out, gate, *grads)]


def gate_inputs(tokens, branches, hidden, dtype=torch.float32, device="cpu"):
    narrow = [bf16(tokens, branches, hidden), bf16(tokens, branches, hidden, seed=1), bf16(tokens, hidden, seed=2)]
    weight = bf16(branches, hidden, seed=3).to(device, torch.promote_types(dtype, torch.float32))
    return [*(x.to(device, dtype).requires_grad_() for x in narrow), weight.requires_grad_()]


def convolution_results(tensors, name, dilation, documents):
    out = convolved(*tensors, eps=EPS, dilation=dilation, document_ids=documents, backend=name)
    grads = torch.autograd.grad(out, tensors, bf16(*out.shape, seed=9).to(out))
    return [x.detach().cpu() for x in (out, *grads)]


def convolution_inputs(size, kernel, dtype=torch.float32, device="cpu"):
    branches, hidden = size[2:]
    wide = torch.promote_types(dtype, torch.float32)
    weights = [bf16(branches, hidden, seed=1), bf16(branches * hidden, kernel, seed=2)]
    return [
        bf16(*size).to(device, dtype).requires_grad_(),
        *(x.to(device, wide).requires_grad_() for x in weights),
    ]


def check(found, exact, usual):
    """Not worse than what the definition gives in the same dtype; the interpreter cuts bits off."""
    for ours, true, theirs in zip(found, exact, usual, strict=True):
        assert ours.dtype == theirs.dtype
        within = 2e-6 if ours.dtype == torch.float32 else 2**-7
        assert (ours - true).abs().max() <= within * true.abs().max() + 2 * (theirs - true).abs().max()


def on_cpu(tensors, dtype=None):
    return [x.detach().cpu().to(dtype or x.dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1, 16), (5, 4, 40), (66, 2, 24), (3, 3, 130)])
def test_gate(size, dtype, device):
    tensors = gate_inputs(*size, dtype, device)
    exact, usual = gate_results(on_cpu(tensors, torch.float64), "torch"), gate_results(on_cpu(tensors), "torch")
    check(gate_results(tensors, "triton"), exact, usual)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "documents"),
    [
        ((1, 1, 1, 16), 4, 3, False),
        ((2, 9, 4, 40), 4, 3, True),
        ((2, 11, 3, 24), 3, 2, False),
        ((1, 7, 2, 130), 2, 3, True),
    ],
)
def test_convolution(size, kernel, dilation, documents, dtype, device):
    tensors = convolution_inputs(size, kernel, dtype, device)
    chosen = torch.arange(size[0] * size[1]) % 5 == 0
    ids = chosen.long().cumsum(0).view(size[:2]) if documents else None
    there = None if ids is None else ids.to(device)
    exact = convolution_results(on_cpu(tensors, torch.float64), "torch", dilation, ids)
    usual = convolution_results(on_cpu(tensors), "torch", dilation, ids)
    check(convolution_results(tensors, "triton", dilation, there), exact, usual)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these sizes in every test")
def test_programs_of_the_sizes_that_a_gpu_gets(monkeypatch):
    gates, convolutions = gate_inputs(9, 3, 300), convolution_inputs((1, 9, 3, 300), 3)
    wide = [*gate_results(gates, "triton"), *convolution_results(convolutions, "triton", 2, None)]
    monkeypatch.setattr(tiling, "interpreted", lambda: False)
    found = [*gate_results(gates, "triton"), *convolution_results(convolutions, "triton", 2, None)]
    for ours, theirs in zip(found, wide, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert tiling.row_tiling(gates[0])["BLOCK_HIDDEN"] < 300


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("branches", [1, 4])
def test_the_models_layer_with_kernels_equals_the_one_without(branches, within, device, monkeypatch):
    def run(served):
        monkeypatch.setattr(engram, "kernels_serve", lambda _: served)
        layer = Engram(
            24, 20, branches, norm_eps=EPS, conv_dilation=3, conv_kernel=4, conv_within_documents=within,
            zero_centered_norm=True,
        ).to(device)  # fmt: skip
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                parameter.copy_(random(*parameter.shape, seed=number) / 4)
        shape = (2, 7, 24) if branches == 1 else (2, 7, branches, 24)
        hidden = random(*shape, seed=1).to(device).requires_grad_()
        rows = random(2, 7, 20, seed=2).to(device).requires_grad_()
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2] * 7], device=device)
        gates = []
        layer.on_gate = lambda statistics: gates.append(statistics.mean_M)
        out = layer(hidden, EngramInput(rows, document_ids=documents))
        grads = torch.autograd.grad(out, [hidden, rows, *layer.parameters()], random(*shape, seed=3).to(device))
        return [x.detach().cpu() for x in (out, *gates, *grads)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_scores_near_zero_pass_no_gradient(device):
    hidden, keys, value, weight = gate_inputs(2, 1, 16, device=device)
    with torch.no_grad():
        keys.copy_(torch.cat((hidden[..., 8:], -hidden[..., :8]), -1))  # at right angles
        weight.fill_(1.0)
        keys[1] = hidden[1]
    out, gate = branch_gate(hidden, keys, value, weight, EPS, backend="triton")
    grads = torch.autograd.grad(out.sum(), [hidden, keys])
    assert gate[0].item() == pytest.approx(0.5, abs=1e-3)
    assert not any(grad[0].any() for grad in grads)
    assert all(grad[1].any() for grad in grads)


def test_gradients_of_the_definitions():
    gates = on_cpu(gate_inputs(2, 2, 5), torch.float64)
    assert gradcheck(lambda *x: branch_gate(*x, EPS, backend="torch")[0], gates)
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    convolutions = on_cpu(convolution_inputs((1, 5, 2, 3), 3), torch.float64)
    assert gradcheck(
        lambda *x: convolved(*x, eps=EPS, dilation=1, document_ids=documents, backend="torch"), convolutions
    )


def test_refusals():
    hidden, keys, value, weight = gate_inputs(2, 2, 8)
    with pytest.raises(ValueError, match=r"keys, value and weight are .*\(2, 7\)"):
        branch_gate(hidden, keys, value[:, 1:], weight, EPS)
    with pytest.raises(TypeError, match="fp64"):
        branch_gate(*on_cpu([hidden, keys, value, weight], torch.float64), EPS, backend="triton")
    x, norm, taps = convolution_inputs((1, 4, 2, 8), 3)
    with pytest.raises(ValueError, match=r"norm \(2, 8\) and taps \(15, 3\)"):
        convolved(x, norm, taps[1:], eps=EPS, dilation=1)
    with pytest.raises(TypeError, match="fp64"):
        convolved(x.double(), norm, taps, eps=EPS, dilation=1, backend="triton")
