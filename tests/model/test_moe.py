"""Router, dispatch, experts and balance losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kmem.model.balance import load_balancing_loss, normalised_scores, updated_selection_bias, z_loss
from kmem.model.dispatcher import dispatch_locally
from kmem.model.experts import Experts
from kmem.model.moe import MoE
from kmem.model.router import Router, stable_top_k
from tests.model import tiny

KINDS = {
    "softmax": tiny.SOFTMAX,
    "sigmoid, bias, groups, shared": {**tiny.SIGMOID, **tiny.GROUPS, "num_shared_experts": 1},
    "gated shared experts of their own width": {
        **tiny.SOFTMAX,
        "num_shared_experts": 2,
        "shared_intermediate_size": 12,
        "shared_expert_gate": True,
    },
}


def moe_layer(moe=tiny.SOFTMAX, local_experts=None) -> MoE:
    return tiny.randomise_(MoE(tiny.shape(tiny.GQA, moe), local_experts))


def by_definition(layer: MoE, hidden: torch.Tensor) -> torch.Tensor:
    """Every token through its experts one by one."""
    routing = layer.router(hidden.flatten(0, 1))
    out = torch.zeros_like(hidden).flatten(0, 1)
    for token, x in enumerate(hidden.flatten(0, 1)):
        for expert, weight in zip(routing.experts_TK[token], routing.weights_TK[token], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ x).chunk(2)
            out[token] += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    out = out.view_as(hidden)
    shared = layer.shared_experts
    if shared is None:
        return out
    assert shared.down_proj.weight.shape[1] == (24 if shared.output_gate else 16)
    own = (F.silu(hidden @ shared.gate_proj.weight.T) * (hidden @ shared.up_proj.weight.T)) @ shared.down_proj.weight.T
    return out + (own if shared.output_gate is None else torch.sigmoid(hidden @ shared.output_gate.weight.T) * own)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_its_definition(kind):
    layer = moe_layer(KINDS[kind])
    hidden = tiny.random(2, 9, 32).requires_grad_()
    grad = tiny.random(2, 9, 32, seed=3)
    inputs = [hidden, *layer.parameters()]
    out, expected = layer(hidden), by_definition(layer, hidden)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    ours = torch.autograd.grad(out, inputs, grad)
    for found, wanted in zip(ours, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_experts_sum_to_the_whole(kind):
    """A slice computes what the whole does for the tokens of its experts."""
    whole = moe_layer(KINDS[kind])
    hidden = tiny.random(18, 32)
    routing = whole.router(hidden)
    expected = dispatch_locally(routing)(hidden, whole.experts, None)
    total = torch.zeros_like(hidden)
    for local in (range(0, 3), range(3, 8)):
        part = Experts(tiny.shape(tiny.GQA, KINDS[kind]), local)
        part.load_state_dict(
            {name: value[local.start : local.stop] for name, value in whole.experts.state_dict().items()}
        )
        here_TK = (routing.experts_TK >= local.start) & (routing.experts_TK < local.stop)
        for token, slot in here_TK.nonzero():
            counts = F.one_hot(routing.experts_TK[token, slot] - local.start, len(local))
            total[token] += routing.weights_TK[token, slot] * part(hidden[token, None], counts)[0]
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


def test_an_expert_without_tokens_and_a_rank_without_rows():
    experts = tiny.randomise_(Experts(tiny.shape(tiny.GQA, tiny.SOFTMAX)))
    rows = tiny.random(5, 32).requires_grad_()
    counts = torch.tensor([0, 2, 0, 0, 3, 0, 0, 0])
    experts(rows, counts).square().sum().backward()
    assert experts.down_proj.grad[counts == 0].eq(0).all()
    assert experts.down_proj.grad[counts > 0].ne(0).any()

    experts.zero_grad()
    out = experts(rows[:0], torch.zeros_like(counts))
    out.square().sum().backward()
    assert out.shape == (0, 32)
    assert experts.gate_up_proj.grad.eq(0).all()


def test_rows_that_no_expert_counts_are_refused():
    """grouped_mm would return uninitialised memory for them."""
    experts = Experts(tiny.shape(tiny.GQA, tiny.SOFTMAX))
    with pytest.raises(AssertionError, match=r"\b5 rows\b.*\b6\b"):
        experts(tiny.random(6, 32), torch.tensor([0, 2, 0, 0, 3, 0, 0, 0]))


@pytest.mark.parametrize(
    ("named", "sizes"),
    [
        ("hidden_size=36", {"hidden_size": 36}),
        ("moe.intermediate_size=12", {"moe": {**tiny.SOFTMAX, "intermediate_size": 12}}),
    ],
)
def test_unaligned_experts_are_refused(named, sizes):
    options = {"moe": tiny.SOFTMAX, **sizes}
    with pytest.raises(ValueError, match=rf"{named} .*\b8\b"):
        Experts(tiny.shape(tiny.GQA, **options))


@pytest.mark.parametrize("width", [3, 6])
def test_the_alignment_that_is_guarded_against(width):
    """If this stops failing, the guard in Experts can go."""
    with pytest.raises(RuntimeError, match="16"):
        F.grouped_mm(torch.randn(4, width), torch.randn(2, width, 4), offs=torch.tensor([2, 4], dtype=torch.int32))


def test_equal_scores_choose_the_lower_expert():
    values = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert stable_top_k(values, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert torch.equal(stable_top_k(values, 4), values.sort(dim=-1, descending=True, stable=True).indices[:, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_maths_is_fp32(dtype):
    router = tiny.randomise_(Router(tiny.shape(tiny.GQA, tiny.SIGMOID))).to(dtype)
    assert router.selection_bias.dtype == torch.float32
    hidden = tiny.random(16, 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(hidden)
    assert {routing.logits_TE.dtype, routing.scores_TE.dtype, routing.weights_TK.dtype} == {torch.float32}
    assert torch.equal(routing.logits_TE, hidden.float() @ router.weight.float().T)


def test_selection_bias_stays_fp32_and_moves_with_the_module():
    router = tiny.randomise_(Router(tiny.shape(tiny.GQA, tiny.SIGMOID)))
    bias = router.selection_bias.clone()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.selection_bias, bias)
    assert router.to("meta").selection_bias.device.type == "meta"
    assert router.to_empty(device="cpu").selection_bias.dtype == torch.float32


def test_selection_bias_chooses_but_does_not_weigh():
    router = tiny.randomise_(Router(tiny.shape(tiny.GQA, {**tiny.SIGMOID, "renormalize": False})))
    router.selection_bias[5] = 100.0
    routing = router(tiny.random(16, 32))
    assert routing.experts_TK[:, 0].eq(5).all()
    assert torch.equal(routing.weights_TK, routing.scores_TE.gather(1, routing.experts_TK))


def test_bias_moves_towards_the_underloaded():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    moved = updated_selection_bias(bias, torch.tensor([0, 4, 9, 3]), 0.25)
    assert moved.tolist() == [0.75, 0.0, -0.75, 0.25]


def explicit_losses(layer: MoE, hidden: torch.Tensor) -> torch.Tensor:
    """The three balance losses by the public formulas, as an ordinary term of a loss."""
    moe = layer.moe
    routing = layer.router(hidden.flatten(0, 1))
    scores = normalised_scores(routing.scores_TE, moe.score_function)
    experts = scores.topk(moe.top_k).indices
    rows = hidden.shape[:2]
    return (
        moe.aux_loss * load_balancing_loss(scores[None], experts[None])[0]
        + moe.sequence_aux_loss * load_balancing_loss(scores.unflatten(0, rows), experts.unflatten(0, rows)).mean()
        + moe.z_loss * z_loss(routing.logits_TE)
    )


def padded(layer, tokens_B, width):
    """The layer told that only the first tokens of each row are there; what is told, bool [B, T]."""
    padding = torch.arange(width) >= torch.tensor(tokens_B)[:, None]
    layer.padding = lambda: padding
    return padding


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_nowhere(kind):
    """Losses, their gradients and statistics are those of the tokens alone, whatever stands in the padding."""
    layer = moe_layer({**KINDS[kind], **tiny.LOSSES, "sequence_aux_loss": 0.0})
    seen = []
    layer.on_routing = seen.append
    tokens = tiny.random(1, 13, 32)
    grad = tiny.random(1, 13, 32, seed=3)
    layer(tokens).backward(grad)
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()

    real = ~padded(layer, [8, 5], 8)
    rows = tiny.random(2, 8, 32, seed=9)
    rows[real], wide = tokens[0], torch.zeros(2, 8, 32)
    wide[real] = grad[0]
    layer(rows).backward(wide)
    for parameter, wanted in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-5, rtol=1e-4)
    alone, found = seen
    assert torch.equal(found.counts_E, alone.counts_E)
    assert (int(found.excluded), int(alone.excluded)) == (3 * layer.moe.top_k, 0)
    for name in ("aux_loss", "z_loss", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), msg=name)

    counting = moe_layer({**KINDS[kind], **tiny.LOSSES, "balance_padding": True})
    counting.on_routing = seen.append
    padded(counting, [8, 5], 8)
    counting(rows)
    assert int(seen[-1].counts_E.sum()) == 16 * layer.moe.top_k


def test_a_sequence_is_balanced_over_its_own_tokens():
    """The loss over each sequence, of rows of unequal lengths, is the mean of each one's."""
    layer = moe_layer({**KINDS["softmax"], "sequence_aux_loss": 1.0})
    seen = []
    layer.on_routing = seen.append
    rows = tiny.random(2, 8, 32)
    layer(rows[:1]), layer(rows[1:, :5])
    padded(layer, [8, 5], 8)
    layer(rows)
    first, second, both = (statistics.sequence_aux_loss for statistics in seen)
    torch.testing.assert_close(both, (first + second) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_injected_losses_act_on_gradients_alone(kind):
    plain, balanced = moe_layer(KINDS[kind]), moe_layer({**KINDS[kind], **tiny.LOSSES})
    balanced.loss_scale = 0.5
    hidden, grad = tiny.random(3, 8, 32).requires_grad_(), tiny.random(3, 8, 32, seed=3)
    out, expected = balanced(hidden), plain(hidden)
    assert torch.equal(out, expected)

    ours = torch.autograd.grad(out, [hidden, *balanced.parameters()], grad)
    total = (expected * grad).sum() + 0.5 * explicit_losses(balanced, hidden)
    wanted = torch.autograd.grad(
        total, [hidden, *plain.parameters(), balanced.router.weight], allow_unused=True, materialize_grads=True
    )
    by_name = dict(zip([name for name, _ in plain.named_parameters()], wanted[1:-1], strict=True))
    by_name["router.weight"] = by_name["router.weight"] + wanted[-1]
    torch.testing.assert_close(ours[0], wanted[0], atol=1e-5, rtol=1e-4)
    for (name, _), found in zip(balanced.named_parameters(), ours[1:], strict=True):
        torch.testing.assert_close(found, by_name[name], atol=1e-5, rtol=1e-4)


def test_sequence_loss_does_not_depend_on_micro_batches():
    moe = {**tiny.SOFTMAX, "sequence_aux_loss": 0.5, "z_loss": 0.1}
    hidden = tiny.random(4, 8, 32)

    def router_gradient(micro_batches: int) -> torch.Tensor:
        layer = moe_layer(moe)
        layer.loss_scale = 1 / micro_batches
        for part in hidden.chunk(micro_batches):
            layer(part).backward(torch.zeros_like(part))
        return layer.router.weight.grad

    whole = router_gradient(1)
    assert whole.abs().max() > 1e-3
    for micro_batches in (2, 4):
        torch.testing.assert_close(router_gradient(micro_batches), whole, atol=1e-7, rtol=1e-5)


def test_balanced_routing_has_unit_loss():
    scores, experts = torch.full((2, 8, 4), 0.25), torch.arange(4).repeat(4).view(2, 8, 1)
    torch.testing.assert_close(load_balancing_loss(scores, experts), torch.ones(2))


def test_statistics_describe_the_forward():
    layer = moe_layer({**KINDS["sigmoid, bias, groups, shared"], **tiny.LOSSES})
    hidden = tiny.random(3, 8, 32)
    seen = []
    layer.on_routing = seen.append
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            layer(hidden)
    with torch.no_grad():
        routing = layer.router(hidden.flatten(0, 1))
        explicit = explicit_losses(layer, hidden)
    scores = normalised_scores(routing.scores_TE, "sigmoid")
    for statistics in seen:
        assert torch.equal(statistics.counts_E, routing.counts_E)
        assert statistics.counts_E.sum() == 3 * 8 * layer.moe.top_k
        weighted = sum(layer.moe[name] * getattr(statistics, name) for name in tiny.LOSSES)
        torch.testing.assert_close(weighted, explicit)
        torch.testing.assert_close(statistics.entropy, -(scores * scores.log()).sum(-1).mean())
        assert 0 < statistics.entropy < math.log(8)
        assert not any(value.requires_grad for value in vars(statistics).values())


def test_recomputation_is_exact_and_observed_once():
    def gradients(recompute: bool):
        layer = moe_layer({**KINDS["sigmoid, bias, groups, shared"], **tiny.LOSSES})
        seen = []
        layer.on_routing = seen.append
        hidden = tiny.random(3, 8, 32).requires_grad_()
        out = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
        out.square().sum().backward()
        assert len(seen) == 1
        return [hidden.grad, *(parameter.grad for parameter in layer.parameters())]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_dispatcher_is_replaceable():
    layer = moe_layer()

    def dispatcher(routing):
        return lambda hidden, experts, shared: hidden * routing.weights_TK.sum(-1, keepdim=True)

    layer.dispatcher = dispatcher
    hidden = tiny.random(2, 4, 32)
    torch.testing.assert_close(layer(hidden), hidden)
