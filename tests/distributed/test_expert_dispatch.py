"""Experts on two ranks: what one process computes, with the shared experts beside the exchange and not after it."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.model import tiny

MOE = {**tiny.SIGMOID, "num_shared_experts": 1}


def whole_layer(moe, seed=0):
    from kmem.model.moe import MoE

    return tiny.randomise_(MoE(tiny.shape(tiny.GQA, moe)), seed)


def half_layer(whole, moe):
    """The layer with this rank's half of the experts, on the group of all ranks."""
    from kmem.model.moe import MoE
    from kmem.parallel.expert_dispatch import AllToAllDispatcher

    half = moe["num_experts"] // 2
    held = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    layer = MoE(tiny.shape(tiny.GQA, moe), range(moe["num_experts"])[held])
    values = whole.state_dict().items()
    layer.load_state_dict({name: value[held] if name.startswith("experts.") else value for name, value in values})
    layer.dispatcher = AllToAllDispatcher(dist.group.WORLD)
    return layer


def again(layer, recompute):
    """The layer as `train.recompute` runs it."""
    from kmem.parallel.selective_recompute import checkpoint_selectively

    if recompute == "selective":
        return partial(checkpoint_selectively, layer)
    return partial(checkpoint, layer, use_reentrant=False) if recompute == "full" else layer


def gradients_case(moe, recompute):
    """This rank's output, gradient of the input, and gradients of what it holds; the whole layer's for the same."""
    dist.init_process_group("gloo")
    whole = whole_layer(moe)
    layer = half_layer(whole, moe)
    rank = dist.get_rank()
    inputs = [tiny.random(2, 5 + 3 * source, 32, seed=source) for source in range(2)]
    mine = inputs[rank].clone().requires_grad_()
    out = again(layer, recompute)(mine)
    out.square().sum().backward()
    theirs = [value.clone().requires_grad_() for value in inputs]
    expected = [whole(value) for value in theirs]
    sum(value.square().sum() for value in expected).backward()
    held = slice(layer.experts.local_experts.start, layer.experts.local_experts.stop)
    pairs = {
        "output": (out, expected[rank]),
        "input": (mine.grad, theirs[rank].grad),
        "gate_up": (layer.experts.gate_up_proj.grad, whole.experts.gate_up_proj.grad[held]),
        "down": (layer.experts.down_proj.grad, whole.experts.down_proj.grad[held]),
    }
    return {name: [tensor.detach().clone() for tensor in pair] for name, pair in pairs.items()}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shared", [{"num_shared_experts": 0}, {"shared_expert_gate": True}], ids=["none", "gated"])
def test_two_ranks_compute_what_one_process_does(ranks, shared, recompute):
    for pairs in ranks.run(2, gradients_case, MOE | shared, recompute):
        for found, expected in pairs.values():
            assert expected.abs().max() > 0
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Exchanges(TorchDispatchMode):
    """Counts the exchanges that take place: what a recomputation has kept does not come here."""

    count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.count += operator is torch.ops._c10d_functional.all_to_all_single.default
        return operator(*arguments, **(keywords or {}))


def exchanges_case(recompute):
    dist.init_process_group("gloo")
    layer = half_layer(whole_layer(MOE), MOE)
    with Exchanges() as exchanges:
        again(layer, recompute)(tiny.random(2, 5, 32).requires_grad_()).square().sum().backward()
    return exchanges.count


@pytest.mark.parametrize(("recompute", "exchanges"), [("none", 5), ("selective", 5), ("full", 8)])
def test_selective_recomputation_repeats_no_exchange(ranks, recompute, exchanges):
    """Counts, rows out and home, and the gradients of both."""
    assert ranks.run(2, exchanges_case, recompute) == [exchanges, exchanges]


def watch(monkeypatch, events):
    """Note every exchange of rows or counts, and every wait for one."""
    from kmem.parallel import expert_dispatch

    exchange, wait, under_way = expert_dispatch.exchange, expert_dispatch.wait, {}

    def watched_exchange(sent, *arguments):
        what = "rows" if sent.is_floating_point() else "counts"
        events.append(f"send {what}")
        arriving = exchange(sent, *arguments)
        under_way[arriving.data_ptr()] = what
        return arriving

    def watched_wait(arriving):
        events.append(f"wait for {under_way[arriving.data_ptr()]}")
        return wait(arriving)

    monkeypatch.setattr(expert_dispatch, "exchange", watched_exchange)
    monkeypatch.setattr(expert_dispatch, "wait", watched_wait)


def order_case():
    """The order of what happens in a forward and a backward pass."""
    dist.init_process_group("gloo")
    events = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch(monkeypatch, events)
        layer = half_layer(whole_layer(MOE), MOE)
        layer.shared_experts.register_forward_hook(lambda *_: events.append("shared experts"))
        layer.shared_experts.gate_proj.weight.register_hook(lambda *_: events.append("shared gradient"))
        layer.shared_experts.down_proj.weight.register_hook(lambda *_: events.append("shared gradient"))
        out = layer(tiny.random(2, 5, 32).requires_grad_())
        forward = copy.copy(events)
        events.clear()
        out.square().sum().backward()
        return forward, events


def test_shared_experts_run_while_rows_travel(ranks):
    for forward, backward in ranks.run(2, order_case):
        assert forward == [
            "send counts", "wait for counts",
            "send rows", "shared experts", "wait for rows",
            "send rows", "wait for rows",
        ]  # fmt: skip
        assert backward == [
            "send rows", "wait for rows",
            "send rows", "shared gradient", "shared gradient", "wait for rows",
        ]  # fmt: skip


def counts_case(gates):
    """How often ranks exchange counts in a layer of three passes."""
    from kmem.model.decoder import DecoderLayer
    from kmem.parallel.expert_dispatch import AllToAllDispatcher

    dist.init_process_group("gloo")
    shape = tiny.shape(tiny.GQA, MOE | {"chain": {"iterations": 3, "gates": gates}})
    held = range(4) if dist.get_rank() == 0 else range(4, 8)
    layer = tiny.randomise_(DecoderLayer(shape, 0, held))
    layer.feed_forward.dispatcher = AllToAllDispatcher(dist.group.WORLD)
    hidden, events = tiny.random(2, 5, 32), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch(monkeypatch, events)
        layer.feed_forward(hidden, hidden).square().sum().backward()
    return events.count("send counts"), events.count("send rows")


@pytest.mark.parametrize(("gates", "counts"), [("independent", 3), ("frozen", 1)])
def test_counts_travel_once_per_choice(ranks, gates, counts):
    # Rows go out and home, and so do their gradients, but none return to the input, which needs none.
    for exchanged in ranks.run(2, counts_case, gates):
        assert exchanged == (counts, 11)
