"""The kernels of hyper-connections against their definition, forward and backward, and against the model's own code."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from kmem.model import hyper_connections
from kmem.model.hyper_connections import HyperConnection
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels import tiling
from kmem_kernels.hyper_connection import triton as kernels
from kmem_kernels.hyper_connection.op import read, write

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
SIZES = [(1, 2, 16), (5, 4, 40), (66, 3, 24), (3, 2, 130), (9, 5, 20), (2, 8, 16)]  # N, M, D
EPS, ITERATIONS = 1e-6, 20


def inputs(tokens, branches, hidden, dtype=torch.float32, device="cpu"):
    numbers, width = branches * (branches + 2), branches * hidden
    made = (
        random(tokens, branches, hidden),
        3 * width**-0.5 * random(numbers, width, seed=1),  # mixings that are far from even
        random(numbers, seed=2),
        torch.tensor([0.5, 1.0, 2.0]),
        random(tokens, hidden, seed=3),
    )
    return [x.to(device, dtype).requires_grad_() for x in made]


def results(tensors, backend, iterations=ITERATIONS):
    """What is read, the mappings and what is written, and the gradients of all inputs."""
    streams, weight, bias, scale, output = tensors
    found = read(streams, weight, bias, scale, eps=EPS, iterations=iterations, backend=backend)
    written = write(found.streams, output, found.mappings, backend=backend)
    outs = (found.taken, found.mappings, written)
    # Numbers that every dtype holds.
    grads = [random(*out.shape, seed=5 + number, dtype=torch.bfloat16).to(out) for number, out in enumerate(outs)]
    return [x.detach().cpu() for x in (*outs, *torch.autograd.grad(outs, tensors, grads))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, device):
    tensors = inputs(*size, dtype, device)
    found = results(tensors, "triton")
    # The definition from the same numbers in fp64, and in the same dtype.
    exact, rounded = (
        results([x.detach().cpu().to(wanted).requires_grad_() for x in tensors], "torch")
        for wanted in (torch.float64, dtype)
    )
    for ours, true, usual in zip(found, exact, rounded, strict=True):
        assert ours.dtype == usual.dtype
        # The interpreter cuts bits off where a GPU rounds to the nearest.
        within = 1e-6 if ours.dtype == torch.float32 else 2**-7
        assert (ours - true).abs().max() <= within * true.abs().max() + 2 * (usual - true).abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these sizes in every test")
def test_programs_of_the_sizes_that_a_gpu_gets(monkeypatch):
    tensors = inputs(19, 4, 300)
    wide = results(tensors, "triton")
    for module in (kernels, tiling):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    for found, expected in zip(results(tensors, "triton"), wide, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_mixings_are_doubly_stochastic_whatever_the_logits(device):
    streams, weight, _, scale, _ = inputs(9, 4, 24, device=device)
    for size in (1.0, 1e4):
        bias = size * random(24, seed=2).to(device)
        mixing = read(streams, weight, bias, scale, eps=EPS, iterations=100, backend="triton").mappings[:, 2:]
        torch.testing.assert_close(mixing.sum(2).cpu(), torch.ones(9, 4))
        assert mixing.isfinite().all()
    torch.testing.assert_close(
        read(streams, 0 * weight, 0 * bias, scale, eps=EPS, iterations=1, backend="triton").mappings[:, 2:].cpu(),
        torch.full((9, 4, 4), 0.25),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_the_models_connection_with_kernels_equals_the_one_without(device, monkeypatch):
    def run(served):
        monkeypatch.setattr(hyper_connections, "kernels_serve", lambda _: served)
        connection = HyperConnection(24, 4, norm_eps=EPS, dynamic_scale=1.0).to(device)
        with torch.no_grad():
            connection.weight.copy_(random(24, 96) / math.sqrt(96))
        streams = random(2, 7, 4, 24, seed=1).to(device).requires_grad_()
        out = connection(streams, lambda x: torch.tanh(x) * 2)
        grads = torch.autograd.grad(out, [streams, *connection.parameters()], random(*out.shape, seed=2).to(device))
        return [x.detach().cpu() for x in (out, *grads)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_any_stride_and_repeated_gradients(device):
    tensors = inputs(5, 4, 40, device=device)
    whole = results(tensors, "triton")
    across = tensors[0].detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    for one, two in zip(whole, results([across, *tensors[1:]], "triton"), strict=True):
        assert torch.equal(one, two)  # and the same bits whenever it is run


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    found = results(inputs(0, 4, 24, device=device), "triton")
    assert [tuple(x.shape) for x in found[:4]] == [(0, 24), (0, 6, 4), (0, 4, 24), (0, 4, 24)]
    assert not any(x.any() for x in found[4:7])


def test_gradients_of_the_definition():
    tensors = [x.detach().double().requires_grad_() for x in inputs(2, 3, 5)]

    def both(streams, weight, bias, scale, output):
        found = read(streams, weight, bias, scale, eps=EPS, iterations=3, backend="torch")
        return found.taken, write(found.streams, output, found.mappings, backend="torch")

    assert gradcheck(both, tensors)


def test_refusals():
    streams, weight, bias, scale, output = inputs(5, 4, 24)
    with pytest.raises(ValueError, match=r"weight, bias and scale are .*\(24, 95\)"):
        read(streams, weight[:, 1:], bias, scale, eps=EPS, iterations=2)
    mappings = torch.zeros(5, 6, 4)
    with pytest.raises(ValueError, match=r"output \(4, 24\)"):
        write(streams, output[1:], mappings)
    doubles = [x.double() for x in (streams, weight, bias, scale)]
    with pytest.raises(TypeError, match="fp64"):
        read(*doubles, eps=EPS, iterations=2, backend="triton")
