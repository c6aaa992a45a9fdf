"""permute and combine against their definition, against kmem's dispatcher, and against what they promise."""

import pytest
import torch
from torch.autograd import gradcheck

from kmem.model.dispatcher import combine_rows, gather_rows, sort_by_expert
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.permute.op import combine, permute
from kmem_kernels.permute.op import sort_by_expert as sort_kernel

SIZES = [  # tokens, experts, experts per token, hidden size
    (1, 4, 1, 8),
    (7, 5, 3, 40),
    (33, 3, 2, 136),
    (65, 13, 8, 24),
    (33, 200, 1, 1),  # most experts are empty
    (7, 6, 6, 1032),
]


def places(tokens, experts, top_k):
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    return sort_by_expert(experts_TK)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens, experts, top_k, hidden_size", SIZES)
def test_values_and_gradients(tokens, experts, top_k, hidden_size, device):
    choice_of_row_N, row_of_choice_TK = places(tokens, experts, top_k)
    hidden, weights = random(tokens, hidden_size), random(tokens, top_k, seed=1)
    rows, grad_rows = random(tokens * top_k, hidden_size, seed=2), random(tokens * top_k, hidden_size, seed=3)
    grad = random(tokens, hidden_size, seed=4)

    def results(place, permuted, combined):
        inputs = [tensor.to(place, copy=True).requires_grad_() for tensor in (hidden, rows, weights)]
        outs = [permuted(inputs[0], row_of_choice_TK.to(place)), combined(*inputs[1:], row_of_choice_TK.to(place))]
        grads = torch.autograd.grad(outs, inputs, [grad_rows.to(place), grad.to(place)])
        return [tensor.cpu() for tensor in (*outs, *grads)]

    names = ("permute", "combine", "hidden's gradient", "rows' gradient", "weights' gradient")
    found = results(device, lambda *x: permute(*x, backend="triton"), lambda *x: combine(*x, backend="triton"))
    definition = results("cpu", lambda *x: permute(*x, backend="torch"), lambda *x: combine(*x, backend="torch"))
    model = results(
        "cpu", lambda x, p: gather_rows(x, choice_of_row_N, p), lambda x, w, p: combine_rows(x, w, choice_of_row_N, p)
    )
    assert torch.equal(found[0], definition[0])
    for name, ours, wanted, theirs in zip(names, found, definition, model, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_model_combines_bf16_rows_as_the_definition_does():
    """In fp32: gradients of the routing weights are those of the rounded rows, not rounded ones."""
    choice_of_row_N, row_of_choice_TK = places(33, 5, 3)
    rows, weights = random(99, 64, dtype=torch.bfloat16), random(33, 3, seed=1).softmax(-1)
    grad = random(33, 64, seed=4, dtype=torch.bfloat16)

    def results(combined):
        inputs = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = combined(*inputs)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    found = results(lambda x, w: combine_rows(x, w, choice_of_row_N, row_of_choice_TK))
    wanted = results(lambda x, w: combine(x, w, row_of_choice_TK, backend="torch"))
    for ours, theirs, tolerance in zip(found, wanted, (2**-8, 2**-8, 1e-6), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=tolerance)
    assert (found[0] != wanted[0]).float().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(1, 1, 1), (7, 5, 3), (33, 200, 4), (700, 13, 2), (1300, 1, 1), (0, 4, 2)]
)
def test_sorting_is_stable(tokens, experts, top_k, device):
    experts_TK = torch.randint(experts, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    experts_TK[: tokens // 2] //= 2  # uneven, some experts empty
    expected = sort_by_expert(experts_TK)
    for found in (
        sort_kernel(experts_TK.to(device), experts, backend="triton"),
        sort_kernel(experts_TK.T.contiguous().T.to(device), experts, backend="triton"),
        sort_kernel(experts_TK, experts, backend="torch"),
    ):
        for ours, wanted in zip(found, expected, strict=True):
            assert torch.equal(ours.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_never_read(device):
    """NaN there reaches nothing, and its gradient is zero."""
    top_k, hidden_size, num_rows = 2, 24, 40
    _, row_of_choice_TK = places(9, 5, top_k)
    row_of_choice_TK = (row_of_choice_TK * 2 + 3).to(device)  # gaps between rows, too
    used = torch.zeros(num_rows, dtype=torch.bool, device=device).index_fill(0, row_of_choice_TK.flatten(), True)
    hidden = random(9, hidden_size).to(device).requires_grad_()
    rows = permute(hidden, row_of_choice_TK, num_rows, backend="triton")
    assert rows[~used].eq(0).all()
    (grad,) = torch.autograd.grad(rows, hidden, torch.where(used[:, None], 1.0, float("nan")).expand_as(rows))
    assert grad.eq(top_k).all()

    weights = random(9, top_k).to(device).requires_grad_()
    padded = torch.where(used[:, None], rows.detach(), float("nan")).requires_grad_()
    out = combine(padded, weights, row_of_choice_TK, backend="triton")
    torch.testing.assert_close(out, hidden * weights.sum(1, keepdim=True))
    out.sum().backward()
    assert padded.grad[~used].eq(0).all()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_weights_in_fp32_for_rows_in_bf16(device):
    _, row_of_choice_TK = places(33, 7, 3)
    rows, weights = random(99, 72, dtype=torch.bfloat16).requires_grad_(), random(33, 3, seed=1).requires_grad_()
    grad = random(33, 72, seed=2, dtype=torch.bfloat16)
    expected = combine(rows, weights, row_of_choice_TK, backend="torch")
    out = combine(rows.to(device), weights.to(device), row_of_choice_TK.to(device), backend="triton")
    assert out.dtype == torch.bfloat16
    found = [out.cpu(), *torch.autograd.grad(out, [rows, weights], grad.to(device))]
    for ours, wanted in zip(found, [expected, *torch.autograd.grad(expected, [rows, weights], grad)], strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_repeated_calls_are_bitwise_equal(dtype, device):
    _, row_of_choice_TK = places(65, 13, 8)
    row_of_choice_TK = row_of_choice_TK.to(device)
    results = []
    for _ in range(2):
        hidden = random(65, 40, dtype=dtype).to(device).requires_grad_()
        weights = random(65, 8, seed=1).to(device).requires_grad_()
        out = combine(permute(hidden, row_of_choice_TK, backend="triton"), weights, row_of_choice_TK, backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), [hidden, weights])])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    _, row_of_choice_TK = places(7, 5, 2)
    hidden, weights = random(24, 7).T.to(device), random(2, 7, seed=1).T.to(device)
    rows = permute(hidden, row_of_choice_TK.to(device), backend="triton")
    assert torch.equal(rows.cpu(), permute(hidden.cpu(), row_of_choice_TK, backend="torch"))
    twice = torch.stack([rows, rows], 1)[:, 0]
    out = combine(twice, weights, row_of_choice_TK.to(device), backend="triton")
    torch.testing.assert_close(out.cpu(), combine(rows.cpu(), weights.cpu(), row_of_choice_TK, backend="torch"))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    row_of_choice_TK = torch.zeros(0, 2, dtype=torch.int64, device=device)
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    rows = permute(hidden, row_of_choice_TK, num_rows=3, backend="triton")
    assert torch.equal(rows, torch.zeros(3, 8, device=device))
    weights = torch.zeros(0, 2, device=device, requires_grad=True)
    out = combine(rows, weights, row_of_choice_TK, backend="triton")
    out.sum().backward()
    assert out.shape == hidden.grad.shape == (0, 8)


def test_gradients_of_the_definition():
    _, row_of_choice_TK = places(5, 4, 2)
    hidden = random(5, 3).double().requires_grad_()
    weights = random(5, 2).double().requires_grad_()
    assert gradcheck(lambda x: permute(x, row_of_choice_TK, 12, backend="torch"), (hidden,))
    rows = random(12, 3).double().requires_grad_()
    assert gradcheck(lambda x, w: combine(x, w, row_of_choice_TK, backend="torch"), (rows, weights))


def test_too_few_rows_are_refused():
    _, row_of_choice_TK = places(5, 4, 2)
    with pytest.raises(ValueError, match=r"^9 rows .*\b10 choices"):
        permute(random(5, 3), row_of_choice_TK, num_rows=9)
