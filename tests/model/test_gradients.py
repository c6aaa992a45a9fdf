"""The hand-written backward passes."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from kmem.model import matmul
from kmem.model.dispatcher import combine_rows, gather_rows, sort_by_expert
from kmem.model.experts import grouped_mm
from kmem.model.norm import RMSNorm
from kmem.model.rope import rotate, rotation
from kmem.model.swiglu import swiglu
from tests.model import tiny


def wide(*size: int, seed: int = 2) -> torch.Tensor:
    return tiny.random(*size, seed=seed, dtype=torch.float64).requires_grad_()


def test_norm():
    norm = tiny.randomise_(RMSNorm(6, 1e-5).double())
    assert gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,)), (wide(2, 3, 6), norm.weight)
    )
    x = wide(4, 6)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-5))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation(fraction):
    view = tiny.shape({**tiny.GQA, "head_dim": 8, "rotary_fraction": fraction})
    by = rotation(view, torch.tensor([[0, 1, 5], [2, 2, 1000]]))
    assert gradcheck(lambda x: rotate(x, by), (wide(2, 3, 2, 8),), atol=1e-4)  # the table is fp32
    x = wide(2, 3, 2, 8)
    turned = rotate(x, by)
    torch.testing.assert_close(turned[0, 0], x[0, 0])  # position 0
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    kept = slice(round(8 * fraction), None)
    assert torch.equal(turned[..., kept], x[..., kept])


def test_products_of_rotated_heads_depend_on_distance():
    view = tiny.shape()
    query, key = tiny.random(1, 1, 1, 16), tiny.random(1, 1, 1, 16, seed=3)

    def product(at: int, to: int) -> torch.Tensor:
        return (
            rotate(query, rotation(view, torch.tensor([[at]]))) * rotate(key, rotation(view, torch.tensor([[to]])))
        ).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100), atol=1e-4, rtol=1e-4)
    assert (product(7, 3) - product(7, 4)).abs() > 1e-3


@pytest.mark.parametrize("top_k", [1, 3])
def test_dispatch(top_k):
    experts_TK = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:top_k] for t in range(5)])
    choice_of_row_N, row_of_choice_TK = sort_by_expert(experts_TK)
    sorted_experts = experts_TK.flatten()[choice_of_row_N]
    assert torch.equal(sorted_experts, sorted_experts.sort().values)
    hidden = wide(5, 3)
    rows = gather_rows(hidden, choice_of_row_N, row_of_choice_TK)
    assert torch.equal(rows[row_of_choice_TK], hidden[:, None].expand(-1, top_k, -1))
    assert gradcheck(lambda x: gather_rows(x, choice_of_row_N, row_of_choice_TK), (hidden,))
    assert gradcheck(
        lambda x, weights: combine_rows(x, weights, choice_of_row_N, row_of_choice_TK),
        (wide(5 * top_k, 3), wide(5, top_k, seed=4)),
    )


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "_USE_ONEDNN", True)


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(theirs)
    found = torch.autograd.grad(ours, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("biased", [False, True])
def test_onednn_linear(onednn, biased):
    x, weight = tiny.random(4, 40, 16).requires_grad_(), tiny.random(24, 16, seed=3).requires_grad_()
    bias = tiny.random(24, seed=4).requires_grad_() if biased else None
    ours = matmul.linear(x, weight, bias)
    assert ours.grad_fn.name() == "_OneDNNLinearBackward"
    assert_same(ours, F.linear(x, weight, bias), [x, weight, *([bias] if biased else [])])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [[32, 0, 50, 18], [0, 0, 100, 0], [1, 2, 3, 94], [97, 1, 1, 1]])
def test_onednn_groups(onednn, counts):
    rows, weights = tiny.random(100, 16).requires_grad_(), tiny.random(4, 24, 16, seed=3).requires_grad_()
    ours = matmul.grouped_linear(rows, weights, torch.tensor(counts))
    assert ours.grad_fn.name() == "_OneDNNGroupedLinearBackward"
    parts = [part @ weight.T for part, weight in zip(rows.split(counts), weights, strict=True)]
    assert_same(ours, torch.cat(parts), [rows, weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[32, 0, 50, 18], [0, 0, 100, 0], [1, 2, 3, 94], [97, 1, 1, 1]])
def test_groups_are_those_of_product_by_product(onednn, monkeypatch, counts, dtype):
    """Bit for bit, output and gradients, though rows of other groups lie in a group's window."""
    if dtype == torch.bfloat16 and not matmul.BF16_IS_ONEDNN:
        pytest.skip("oneDNN multiplies no bf16 matrices on a CPU without AVX-512")
    rows = tiny.random(100, 64, dtype=dtype).requires_grad_()
    gate_up = tiny.random(4, 2 * 48, 64, dtype=dtype, seed=3).requires_grad_()
    down = tiny.random(4, 64, 48, dtype=dtype, seed=4).requires_grad_()
    counts = torch.tensor(counts)
    ours = grouped_mm(rows, gate_up, down, counts)
    assert ours.grad_fn.name() == "_GroupedSwiGLUBackward"
    theirs = matmul.grouped_linear(swiglu(matmul.grouped_linear(rows, gate_up, counts)), down, counts)
    assert ours.equal(theirs)
    inputs, grad = [rows, gate_up, down], tiny.random(100, 64, dtype=dtype, seed=5)
    found = torch.autograd.grad(ours, inputs, grad)
    for one, other in zip(found, torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert one.equal(other)


def test_onednn_transposed_views(onednn):
    a, b = tiny.random(64, 40).T, tiny.random(64, 48, seed=3).T
    torch.testing.assert_close(matmul.times_transposed(a, b), a @ b.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_experts_compute_the_same(dtype):
    """torch's compiler refuses grouped_mm in fp32, and does not follow products group by group."""
    rows = tiny.random(40, 64, dtype=dtype).requires_grad_()
    gate_up = tiny.random(3, 2 * 48, 64, dtype=dtype, seed=3).requires_grad_()
    down = tiny.random(3, 64, 48, dtype=dtype, seed=4).requires_grad_()
    inputs, counts = [rows, gate_up, down], torch.tensor([32, 0, 8])
    grad = tiny.random(40, 64, dtype=dtype, seed=5)
    theirs = grouped_mm(*inputs, counts)
    ours = torch.compile(grouped_mm, backend="aot_eager")(*inputs, counts)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for one, other in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, **tolerance)
