"""The activation of the experts against its definition, forward and backward, and against the model's on a CPU."""

import pytest
import torch
from torch.autograd import gradcheck

from kmem.model.swiglu import swiglu as models_swiglu
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.swiglu.op import silu_times, swiglu

SIZES = [(1, 1), (1, 24), (7, 40), (33, 264), (65, 136), (3, 1032), (130, 768)]  # rows, width


def results(function, inputs, grad, device):
    inputs = [x.to(device, copy=True).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, inputs, grad.to(device)))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows, width", SIZES)
def test_values_and_gradients(rows, width, dtype, device):
    gate_up, grad = 3 * random(rows, 2 * width, dtype=dtype), random(rows, width, seed=1, dtype=dtype)
    found = results(lambda x: swiglu(x, backend="triton"), [gate_up], grad, device)
    # The definition from the same numbers in fp64, rounded once.
    wanted = results(lambda x: swiglu(x, backend="torch"), [gate_up.double()], grad.double(), "cpu")
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    if dtype == torch.bfloat16 and device == "cpu":
        tolerance *= 2  # the interpreter does not round to the nearest
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)
    apart = results(lambda *x: silu_times(*x, backend="triton"), gate_up.chunk(2, dim=1), grad, device)
    assert torch.equal(apart[0], found[0])
    assert torch.equal(torch.cat(apart[1:], dim=1), found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_on_a_cpu(dtype):
    gate_up, grad = random(65, 80, dtype=dtype), random(65, 40, seed=1, dtype=dtype)
    found = results(models_swiglu, [gate_up], grad, "cpu")
    wanted = results(lambda x: swiglu(x, backend="torch"), [gate_up], grad, "cpu")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_stay_finite(device):
    gate_up = torch.tensor([[-1e30, -200.0, -0.0, 200.0, 1.0, 2.0, 3.0, 4.0]])
    out, grad = results(lambda x: swiglu(x, backend="triton"), [gate_up], torch.ones(1, 4), device)
    assert out.tolist() == [[0, 0, 0, 800]]
    assert grad.tolist() == [[0, 0, 1.5, 4, 0, 0, 0, 200]]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_any_stride(device):
    whole = random(9, 100).to(device)
    assert torch.equal(swiglu(whole[:, 10:90], backend="triton"), swiglu(whole[:, 10:90].clone(), backend="triton"))
    across = random(80, 9).to(device).T
    assert torch.equal(swiglu(across, backend="triton"), swiglu(across.contiguous(), backend="triton"))
    grad = random(1, 40).to(device).expand(9, 40)  # as the gradient of a sum is
    x = whole[:, 10:90].clone().requires_grad_()
    first = torch.autograd.grad(swiglu(x, backend="triton"), x, grad)
    assert torch.equal(*first, *torch.autograd.grad(swiglu(x, backend="triton"), x, grad.contiguous()))


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x = torch.zeros(0, 16, device=device, requires_grad=True)
    out = swiglu(x, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 8)
    assert x.grad.shape == (0, 16)


def test_only_the_input_is_kept_for_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        for function in (lambda x: swiglu(x, backend="triton"), models_swiglu):
            kept.clear()
            x = random(5, 16).requires_grad_()
            function(x)
            assert [saved.data_ptr() for saved in kept] == [x.data_ptr()]


def test_gradients_of_the_definition():
    gate, up = (random(5, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert gradcheck(lambda g, u: silu_times(g, u, backend="torch"), (gate, up))
    x = random(5, 6).double().requires_grad_()
    assert gradcheck(lambda x: swiglu(x, backend="torch"), (x,))
    assert gradcheck(models_swiglu, (x,))


def test_refusals():
    with pytest.raises(ValueError, match="5 columns"):
        swiglu(random(2, 5))
    with pytest.raises(ValueError, match=r"gate .*float32 \(2, 3\) .*up .*bfloat16 \(2, 3\)"):
        silu_times(random(2, 3), random(2, 3, dtype=torch.bfloat16))
