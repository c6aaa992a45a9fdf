"""Chain-of-Experts against its algebra, written out token by token in fp64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kmem.model.chain_of_experts import ChainOfExperts
from kmem.model.decoder import Decoder, DecoderLayer
from kmem.model.dispatcher import dispatch_locally
from kmem.model.init import initialise_
from tests.model import tiny
from tests.model.test_moe import explicit_losses

BASE = {**tiny.SOFTMAX, "num_shared_experts": 1}
KINDS = {
    "softmax": tiny.SOFTMAX,
    "sigmoid, bias, groups, shared": {
        **tiny.SIGMOID,
        **tiny.GROUPS,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
    },
}
VARIANTS = [
    {"gates": gates, "residual": residual, "norm": norm, "stream": stream, "shared_experts": shared}
    for gates, residual, norm, stream, shared in itertools.product(
        ["independent", "shared", "frozen"],
        ["inner", "outer", "inner_outer", "init", "none"],
        ["per_iteration", "once"],
        ["prenorm", "normed"],
        ["each_iteration", "once"],
    )
    if (residual, stream) != ("inner_outer", "prenorm")
]
RETROFITS = [
    {"retrofit_scale": True, "residual": residual, "norm": norm}
    for residual, norm in itertools.product(["inner", "outer"], ["per_iteration", "once"])
]


def chained(moe=BASE, iterations=2, **chain):
    return tiny.shape(tiny.GQA, {**moe, "chain": {"iterations": iterations, **chain}})


def decoder_layer(shape) -> DecoderLayer:
    return tiny.randomise_(DecoderLayer(shape, 0))


def feed_forward_half(layer: DecoderLayer, hidden):
    """What follows attention in a decoder layer."""
    normed = layer.feed_forward_norm(hidden)
    if isinstance(layer.feed_forward, ChainOfExperts):
        return layer.feed_forward(hidden, normed)
    return hidden + layer.feed_forward(normed)


def one_expert(layer, expert, x):
    gate, up = (layer.experts.gate_up_proj[expert] @ x).chunk(2)
    return layer.experts.down_proj[expert] @ (F.silu(gate) * up)


def by_definition(decoder: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
    """The algebra of the module docstring, one token and one expert at a time, case by case."""
    layer, first_norm = decoder.feed_forward, decoder.feed_forward_norm
    chain = layer.chain
    rows = []
    for h in hidden.flatten(0, 1):
        n = first_norm(h[None])[0]
        xs, us = [n if chain.stream == "normed" else h], [n]
        choice = None
        for t in range(chain.iterations):
            if choice is None or chain.gates != "frozen":
                router = layer.routers[t] if chain.gates == "independent" else layer.router
                choice = router(us[t][None])
            y = torch.zeros_like(h)
            for expert, weight in zip(choice.experts_TK[0], choice.weights_TK[0], strict=True):
                y = y + weight * one_expert(layer, expert, us[t])
            if layer.shared_experts is not None and (t == 0 or chain.shared_experts == "each_iteration"):
                y = y + layer.shared_experts(us[t])
            if chain.retrofit_scale and t:
                y = y * layer.retrofit_scale[str(t)]
            kind = "inner" if chain.retrofit_scale and t else chain.residual
            for states in (xs, us):
                states.append(
                    {"inner": states[t] + y, "inner_outer": states[t] + y, "init": states[0] + y}.get(kind, y)
                )
            if chain.norm == "per_iteration" and t + 1 < chain.iterations:
                us[-1] = layer.norms[str(t + 1)](xs[-1][None])[0]
        rows.append(h + xs[-1] if chain.residual in ("outer", "inner_outer") else xs[-1])
    return torch.stack(rows).view_as(hidden)


def assert_same_with_gradients(ours, wanted, inputs, **tolerance):
    torch.testing.assert_close(ours, wanted, **tolerance)
    grad = tiny.random(*ours.shape, seed=3).to(ours)
    given = {"allow_unused": True, "materialize_grads": True}
    for found, expected in zip(
        torch.autograd.grad(ours, inputs, grad, **given),
        torch.autograd.grad(wanted, inputs, grad, **given),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_one_iteration_is_the_moe_layer_bit_for_bit(kind, recompute):
    """Outputs and all gradients of the whole decoder layer, with every balance loss on."""
    moe = {**KINDS[kind], **tiny.LOSSES}
    plain = decoder_layer(tiny.shape(tiny.GQA, moe))
    chain = DecoderLayer(chained(moe, 1, stream="prenorm", residual="inner", norm="per_iteration"), 0)
    renamed = {name.replace(".router.", ".routers.0."): value for name, value in plain.state_dict().items()}
    chain.load_state_dict(renamed)
    _, positions = tiny.tokens(2, 9)
    found = {}
    for name, layer in (("plain", plain), ("chain", chain)):
        layer.feed_forward.loss_scale = 0.5
        hidden = tiny.random(2, 9, 32).requires_grad_()
        out = checkpoint(layer, hidden, positions, use_reentrant=False) if recompute else layer(hidden, positions)
        out.backward(tiny.random(2, 9, 32, seed=3))
        gradients = {key.replace(".router.", ".routers.0."): p.grad for key, p in layer.named_parameters()}
        found[name] = {"out": out, "hidden": hidden.grad, **gradients}
    assert found["plain"].keys() == found["chain"].keys()
    for name, value in found["plain"].items():
        assert torch.equal(value, found["chain"][name]), name


@pytest.fixture
def fp64(monkeypatch):
    """Grouped products in fp64, which grouped_mm lacks."""

    def products(rows, weights, counts):
        parts = rows.split(counts.tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])

    monkeypatch.setattr("kmem.model.experts.grouped_linear", products)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("variant", [*VARIANTS, *RETROFITS], ids=lambda variant: "-".join(map(str, variant.values())))
def test_every_variant_is_its_algebra(variant):
    layer = decoder_layer(chained(iterations=3, **variant)).double()
    hidden = tiny.random(2, 3, 32, dtype=torch.float64).requires_grad_()
    assert_same_with_gradients(
        feed_forward_half(layer, hidden),
        by_definition(layer, hidden),
        [hidden, layer.feed_forward_norm.weight, *layer.feed_forward.parameters()],
        rtol=1e-9,
        atol=1e-10,
    )


def test_variants_differ():
    """No option is without effect, except that outer and none do not read the stream."""
    outputs = {}
    for variant in VARIANTS:
        layer = DecoderLayer(chained(iterations=3, **variant), 0)
        values = tiny.randomise_(DecoderLayer(chained(iterations=3), 0)).state_dict()
        values |= {"feed_forward.router.weight": values["feed_forward.routers.0.weight"]}
        layer.load_state_dict({name: values[name] for name in layer.state_dict()})
        hidden = tiny.random(1, 4, 32)
        outputs[tuple(variant.items())] = feed_forward_half(layer, hidden)
    for (one, left), (other, right) in itertools.combinations(outputs.items(), 2):
        one, other = dict(one), dict(other)
        unread = one["residual"] == other["residual"] and one["residual"] in ("outer", "none")
        same = unread and {**one, "stream": None} == {**other, "stream": None}
        assert torch.equal(left, right) == same, (one, other)


def test_figures_of_iterations_leave_padding_out():
    layer = decoder_layer(chained(iterations=3)).feed_forward
    layer.observe_coactivation = True
    seen = []
    layer.on_routing = seen.append
    hidden, normed = tiny.random(2, 8, 32), tiny.random(2, 8, 32, seed=1)
    padding = torch.arange(8) >= torch.tensor([8, 5])[:, None]
    layer(hidden[~padding][None], normed[~padding][None])
    layer.padding = lambda: padding
    layer(hidden, normed)
    for alone, found in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(found.counts_E, alone.counts_E)
        torch.testing.assert_close(found.update_size, alone.update_size)
        torch.testing.assert_close(found.overlap, alone.overlap)
        if alone.iteration:
            assert torch.equal(found.coactivation_EE, alone.coactivation_EE)


def test_every_router_has_its_own_gradient():
    layer = decoder_layer(chained(iterations=3))
    feed_forward_half(layer, tiny.random(2, 9, 32)).square().sum().backward()
    gradients = [router.weight.grad for router in layer.feed_forward.routers]
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(gradients, 2))


@pytest.mark.parametrize("gates", ["independent", "shared", "frozen"])
def test_gradients_of_experts_are_sums_over_their_uses(gates):
    """Against a chain that is unrolled over copies of the experts."""
    layer = decoder_layer(chained(iterations=3, gates=gates))
    copies = [copy.deepcopy(layer.feed_forward.experts) for _ in range(3)]
    feed_forward_half(layer, tiny.random(2, 9, 32)).square().sum().backward()
    whole = [parameter.grad.clone() for parameter in layer.feed_forward.experts.parameters()]
    uses = iter(copies)

    def dispatcher(routing):
        routes = dispatch_locally(routing)
        return lambda hidden, experts, shared: routes(hidden, next(uses), shared)

    layer.feed_forward.dispatcher = dispatcher
    feed_forward_half(layer, tiny.random(2, 9, 32)).square().sum().backward()
    assert next(uses, None) is None
    for name, found in zip(["gate_up_proj", "down_proj"], whole, strict=True):
        parts = [getattr(experts, name).grad for experts in copies]
        assert all(part.abs().max() > 0 for part in parts)
        torch.testing.assert_close(found, sum(parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", RETROFITS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_a_retrofit_starts_as_the_moe_layer_and_moves(variant):
    plain = decoder_layer(tiny.shape(tiny.GQA, BASE))
    layer = DecoderLayer(chained(iterations=3, **variant), 0)
    initialise_(layer, layer.shape, seed=0, prefix="layers.0.")
    values = plain.state_dict()
    router = values.pop("feed_forward.router.weight")
    values |= {f"feed_forward.routers.{t}.weight": router for t in range(3)}
    missing = layer.load_state_dict(values, strict=False).missing_keys
    assert missing
    assert all("retrofit_scale" in name or ".norms." in name for name in missing)
    hidden = tiny.random(2, 9, 32)
    out = feed_forward_half(layer, hidden)
    assert torch.equal(out, feed_forward_half(plain, hidden))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    out.square().sum().backward()
    optimizer.step()
    scales = layer.feed_forward.retrofit_scale
    assert list(scales) == ["1", "2"]
    assert all(scale.abs().min() > 0 for scale in scales.values())
    assert not torch.allclose(feed_forward_half(layer, hidden), feed_forward_half(plain, hidden))


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("gates", ["independent", "shared", "frozen"])
def test_balance_losses_act_per_routing(gates):
    """Their sum over the iterations, once when the choice is frozen, as a term of the loss; the output is unchanged."""
    moe = {**tiny.SIGMOID, "num_shared_experts": 1}
    plain = decoder_layer(chained(moe, gates=gates)).double()
    balanced = decoder_layer(chained({**moe, **tiny.LOSSES}, gates=gates)).double()
    balanced.feed_forward.loss_scale = 0.5
    hidden = tiny.random(3, 8, 32, dtype=torch.float64).requires_grad_()
    seen = []
    routers = balanced.feed_forward.iteration_routers()
    for router in dict.fromkeys(routers):
        router.register_forward_hook(lambda router, given, routing: seen.append((router, given[0])))
    out, expected = feed_forward_half(balanced, hidden), feed_forward_half(plain, hidden)
    assert torch.equal(out, expected)
    assert len(seen) == (1 if gates == "frozen" else 2)
    inputs = [hidden, *balanced.parameters()]
    given = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(out, inputs, torch.ones_like(out), **given)

    # The reference states the losses on the inputs that the routers saw in a layer that injects nothing.
    reference = decoder_layer(chained({**moe, **tiny.LOSSES}, gates=gates)).double()
    reference.feed_forward.loss_scale = 0.0
    read = []
    for router in dict.fromkeys(reference.feed_forward.iteration_routers()):
        router.register_forward_hook(lambda router, given, routing: read.append((router, given[0])))
    again = feed_forward_half(reference, hidden)
    total = again.sum()
    for router, rows in list(read):
        total = total + 0.5 * explicit_losses(Routed(reference.feed_forward.moe, router), rows.unflatten(0, (3, 8)))
    wanted = torch.autograd.grad(total, [hidden, *reference.parameters()], **given)
    for found, target in zip(ours, wanted, strict=True):
        torch.testing.assert_close(found, target, rtol=1e-9, atol=1e-10)


class Routed:
    """A router with the options of its layer, for `explicit_losses`."""

    def __init__(self, moe, router):
        self.moe, self.router = moe, router


@pytest.mark.parametrize("gates", ["independent", "shared", "frozen"])
def test_statistics_are_per_iteration(gates):
    layer = decoder_layer(chained({**tiny.SIGMOID, **tiny.LOSSES}, iterations=3, gates=gates))
    chain = layer.feed_forward
    chain.observe_coactivation = True
    seen, states, choices = [], [], []
    chain.on_routing = seen.append
    for norm in chain.norms.values():
        norm.register_forward_hook(lambda norm, given, out: states.append(given[0]))
    for router in dict.fromkeys(chain.iteration_routers()):
        router.register_forward_hook(lambda router, given, routing: choices.append(routing.experts_TK))
    hidden = tiny.random(3, 8, 32)
    states = [hidden]
    states.append(feed_forward_half(layer, hidden))
    choices = choices * (3 if gates == "frozen" else 1)
    assert [statistics.iteration for statistics in seen] == [0, 1, 2]
    for t, statistics in enumerate(seen):
        assert torch.equal(statistics.counts_E, torch.bincount(choices[t].flatten(), minlength=8))
        assert statistics.coactivation_EE is None if t == 0 else statistics.coactivation_EE.shape == (8, 8)
        assert (statistics.sequence_aux_loss == 0) == (gates == "frozen" and t > 0)
        size = (states[t + 1] - states[t]).norm(dim=-1) / states[t].norm(dim=-1)
        torch.testing.assert_close(statistics.update_size, size.mean())
        assert not any(getattr(value, "requires_grad", False) for value in vars(statistics).values())
        if t:
            pairs = torch.zeros(8, 8, dtype=torch.int64)
            for before, now in zip(choices[t - 1].tolist(), choices[t].tolist(), strict=True):
                for a, b in itertools.product(before, now):
                    pairs[a, b] += 1
            assert torch.equal(statistics.coactivation_EE, pairs)
            torch.testing.assert_close(statistics.overlap, pairs.diagonal().sum() / choices[t].numel())
    assert (seen[1].overlap == 1) == (gates == "frozen")


def test_recomputation_is_exact_and_observed_once():
    def gradients(recompute: bool):
        layer = decoder_layer(chained({**KINDS["sigmoid, bias, groups, shared"], **tiny.LOSSES}, iterations=3))
        seen = []
        layer.feed_forward.on_routing = seen.append
        hidden = tiny.random(3, 8, 32).requires_grad_()
        out = (
            checkpoint(feed_forward_half, layer, hidden, use_reentrant=False)
            if recompute
            else feed_forward_half(layer, hidden)
        )
        out.square().sum().backward()
        assert [statistics.iteration for statistics in seen] == [0, 1, 2]
        return [hidden.grad, *(parameter.grad for parameter in layer.feed_forward.parameters())]

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_names_and_initial_values():
    shape = chained(tiny.SIGMOID, iterations=3, retrofit_scale=True)
    decoder = Decoder(shape)
    tiny.randomise_(decoder)
    initialise_(decoder, shape, seed=3)
    own = {name.removeprefix("layers.1.feed_forward."): value for name, value in decoder.state_dict().items()}
    assert {f"routers.{t}.{name}" for t in range(3) for name in ("weight", "selection_bias")} <= own.keys()
    assert not torch.equal(own["routers.0.weight"], own["routers.1.weight"])
    for t in (1, 2):
        assert own[f"norms.{t}.weight"].eq(1).all()
        assert own[f"retrofit_scale.{t}"].eq(0).all()
    assert not {"norms.0.weight", "retrofit_scale.0", "router.weight"} & own.keys()
    assert {"router.weight", "experts.down_proj"} <= {
        name.removeprefix("feed_forward.") for name in DecoderLayer(chained(gates="frozen"), 0).state_dict()
    }
