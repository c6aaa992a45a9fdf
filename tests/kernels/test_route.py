"""The router's kernel against its definition, against kmem's router, and against what it promises."""

import pytest
import torch
from torch.autograd import gradcheck

from kmem.model.router import Router, stable_top_k
from kmem.model.shape import Shape
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.route.op import route

PLAIN = {"score_function": "softmax", "renormalize": True}
GROUPED = {"score_function": "sigmoid", "num_groups": 6, "top_groups": 3, "scaling_factor": 2.5}
CASES = {
    "one token, one choice": (1, 5, {**PLAIN, "top_k": 1}, False),
    "prime experts": (33, 13, {**PLAIN, "top_k": 3, "renormalize": False, "scaling_factor": 1.5}, True),
    "every expert": (7, 6, {**PLAIN, "top_k": 6}, True),
    "one expert": (3, 1, {"score_function": "sigmoid", "top_k": 1}, False),
    "sigmoid": (33, 40, {"score_function": "sigmoid", "top_k": 8}, True),
    "many experts": (7, 600, {**PLAIN, "top_k": 10}, False),
    "groups of four": (33, 24, {**GROUPED, "top_k": 4, "group_score_top_k": 2}, True),
    "groups of five, best three": (7, 30, {**GROUPED, "top_k": 7, "group_score_top_k": 3, "renormalize": False}, True),
    "groups by their best, softmax": (
        33,
        64,
        {**PLAIN, "top_k": 5, "num_groups": 8, "top_groups": 4, "group_score_top_k": 1},
        False,
    ),
}
"""Name: tokens, experts, options, whether there is a selection bias."""


def inputs(tokens, experts, biased):
    return random(tokens, experts), 0.1 * random(experts, seed=1) if biased else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_definition(case, device):
    tokens, experts, options, biased = CASES[case]
    logits, bias = inputs(tokens, experts, biased)
    grads = [random(tokens, options["top_k"], seed=2), random(tokens, experts, seed=3)]
    found, expected = (logits.to(place, copy=True).requires_grad_() for place in (device, "cpu"))
    ours = route(found, None if bias is None else bias.to(device), **options, backend="triton")
    definition = route(expected, bias, **options, backend="torch")
    assert not ours.experts_TK.requires_grad
    assert not ours.counts_E.requires_grad
    for name in definition._fields:
        torch.testing.assert_close(
            getattr(ours, name).cpu(), getattr(definition, name), msg=lambda m, n=name: f"{n}: {m}"
        )
    # With and without a gradient of the scores, which only balance losses give.
    for kept in (slice(0, 1), slice(1, 2), slice(0, 2)):
        outs = [(choice.weights_TK, choice.scores_TE)[kept] for choice in (ours, definition)]
        (grad,) = torch.autograd.grad(outs[0], found, [grad.to(device) for grad in grads[kept]], retain_graph=True)
        (wanted,) = torch.autograd.grad(outs[1], expected, grads[kept], retain_graph=True)
        torch.testing.assert_close(grad.cpu(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_definition_is_the_models_router(case):
    tokens, experts, options, biased = CASES[case]
    logits, bias = inputs(tokens, experts, biased)
    moe = {
        "num_experts": experts,
        "selection_bias": biased,
        **{"num_groups": 1, "top_groups": 1, "group_score_top_k": 2, "renormalize": True, "scaling_factor": 1},
        **options,
    }
    router = Router(Shape({"hidden_size": experts, "moe": moe}))
    router.weight.data = torch.eye(experts)  # its logits are its input
    if bias is not None:
        router.selection_bias.copy_(bias)
    routing = router(logits.requires_grad_())
    torch.testing.assert_close(routing.logits_TE, logits, rtol=0, atol=0)
    choice = route(logits, bias, **options, backend="torch")
    for name in choice._fields:
        torch.testing.assert_close(getattr(choice, name), getattr(routing, name), rtol=0, atol=0)
    weight = random(tokens, options["top_k"], seed=2)
    grads = [torch.autograd.grad((part.weights_TK * weight).sum(), logits)[0] for part in (choice, routing)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts, groups", [(256, 1), (37, 1), (36, 3)])
def test_ties_go_to_the_lower_expert(device, experts, groups):
    """Logits of few values: the choice is the stable top-k of the returned scores, bit for bit."""
    logits = torch.randint(3, (65, experts), generator=torch.Generator().manual_seed(experts)).float().to(device)
    logits[0] = 0
    bias = (torch.arange(experts) % 2 * 0.25).to(device)  # exact: makes ties across scores, too
    for selection_bias in (None, bias):
        choice = route(logits, selection_bias, top_k=8, score_function="sigmoid", backend="triton", num_groups=groups)
        preference = choice.scores_TE if selection_bias is None else choice.scores_TE + selection_bias
        if groups > 1:
            group_scores = preference.unflatten(1, (groups, -1)).sort(dim=-1, descending=True).values[..., :2].sum(-1)
            best = stable_top_k(group_scores, 1)
            allowed = torch.arange(experts, device=device) // (experts // groups) == best
            preference = preference.masked_fill(~allowed, float("-inf"))
        assert torch.equal(choice.experts_TK, stable_top_k(preference, 8))
        assert torch.equal(choice.counts_E, torch.bincount(choice.experts_TK.flatten(), minlength=experts))
        assert torch.equal(choice.counts_E.sum(), torch.tensor(65 * 8, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
def test_logits_that_are_not_finite_choose_as_torch_does(device, score_function):
    """A step that diverged must not read or write out of bounds; NaN comes first in torch's order, too."""
    logits = random(6, 11)
    logits[0] = float("nan")
    logits[1, 4] = float("nan")
    logits[2, 7] = float("inf")
    logits[3] = float("-inf")
    logits[4, 5:] = float("-inf")
    options = {"top_k": 4, "score_function": score_function}
    expected = route(logits, None, **options, backend="torch")
    choice = route(logits.to(device), None, **options, backend="triton")
    assert torch.equal(choice.experts_TK.cpu(), expected.experts_TK)
    torch.testing.assert_close(choice.weights_TK.cpu(), expected.weights_TK, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_and_strided_calls_are_bitwise_equal(device):
    logits = random(70, 33).to(device)
    first, second, strided = (
        route(x, None, top_k=3, backend="triton") for x in (logits, logits, logits.T.contiguous().T)
    )
    for name in first._fields:
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(strided, name))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device):
    logits = torch.zeros(0, 8, device=device, requires_grad=True)
    choice = route(logits, None, top_k=2, backend="triton")
    assert choice.experts_TK.shape == (0, 2)
    assert choice.counts_E.tolist() == [0] * 8
    choice.weights_TK.sum().backward()
    assert logits.grad.shape == (0, 8)


def test_gradients_of_the_definition():
    logits = random(5, 12).double().requires_grad_()
    options = {"top_k": 3, "score_function": "sigmoid", "num_groups": 3, "top_groups": 2, "backend": "torch"}
    assert gradcheck(lambda x: route(x, None, **options)[1:3], (logits,))


def test_refusals():
    logits = random(2, 12)
    with pytest.raises(ValueError, match=r"\b5 of 12 experts .*\b1 of 3 groups"):
        route(logits, None, top_k=5, num_groups=3)
    with pytest.raises(ValueError, match=r"\b4 experts .*\b5$"):
        route(logits, None, top_k=2, num_groups=3, group_score_top_k=5)
    with pytest.raises(ValueError, match=r"backend 'cuda' .*'triton', 'torch'"):
        route(logits, None, top_k=2, backend="cuda")
    with pytest.raises(TypeError, match="float64"):
        route(logits.double(), None, top_k=2, backend="triton")
