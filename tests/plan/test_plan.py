"""`kmem plan`: its parts against figures worked out by hand, and what it says to a user."""

import json

import pytest

from kmem.cli import main
from kmem.config import load_config
from kmem.parallel.mesh import Mesh
from kmem.plan.hardware import Hardware, Shares, find_hardware
from kmem.plan.prediction import predict

ALL = Shares(products=1.0, grouped=1.0, attention=1.0, memory=1.0, links=1.0, host=1.0, launch=0.0)


def device(**changes):
    rates = {"flop": 1e15, "memory": 1e18, "node_link": 1e18, "network": 1e18, "bus": 1e18, "host_memory": 1e18}
    return Hardware(**({"name": "ideal", "per_node": 8, "bytes": 10**12} | rates | changes))


def planned(name, ranks, hardware, *overrides, shares=ALL, **keywords):
    config = load_config(name, list(overrides))
    mesh = Mesh(0, config.parallel.pipeline, config.data_parallel_size(ranks), config.parallel.expert)
    return predict(config, mesh, hardware, shares, **keywords)


def test_a_device_without_limits_but_products_has_an_mfu_of_one_on_one_stage():
    found = planned("engram-150m", 8, device(), "train.recompute=none")
    assert found.mfu == pytest.approx(1, rel=0.015)  # the backward pass of attention computes its scores again
    again = planned("engram-150m", 8, device(), "train.recompute=full")
    assert again.flop == found.flop  # recomputation is no work of the model
    assert 0.72 < again.mfu < 0.80  # but takes up to a third more time


def test_model_flop_are_six_per_parameter_and_token_and_those_of_attention():
    from kmem.model.parameter_counts import count_parameters

    config = load_config("moe-27b")
    counts = count_parameters(config.model.shape)
    found = planned("moe-27b", 16, device())
    per_token = found.flop / found.tokens
    products = 6 * (sum(counts.layers) + counts.head)
    heads, width, length = 32, 128 + 64 + 128, 4096
    attention = 3 * config.model.num_layers * heads * width * (length + 1)  # half of the pairs
    assert per_token == pytest.approx(products + attention, rel=0.01)


def test_each_rate_slows_its_parts_and_no_other():
    base = planned("engram-27b", 64, device())
    for rate, slowed in {
        "node_link": {"between stages", "gradients between ranks"},
        "bus": {"table bus"},
        "network": {"table exchange"},
        "host_memory": {"table update"},
    }.items():
        found = planned("engram-27b", 64, device(**{rate: 1e12}))
        grown = {name for name, part in found.parts.items() if part > 1.01 * base.parts.get(name, 0)}
        assert slowed <= grown <= slowed | {"pipeline bubble"}, rate
    assert planned("engram-150m", 8, device(node_link=1e12)).parts["expert exchange"] > 0


def test_the_bubble_is_that_of_1f1b():
    found = planned("moe-27b", 16, device(memory=3e12))
    micro_batches, stages = 1280 // 2, 8
    compute = sum(part for name, part in found.parts.items() if name in PER_MICRO_BATCH)
    assert found.parts["pipeline bubble"] == pytest.approx(compute * (stages - 1) / micro_batches)


PER_MICRO_BATCH = {
    "matrix products", "products of experts", "attention", "hyper-connections", "other operators",
    "gradient accumulation", "between stages", "launches",
}  # fmt: skip


def test_launches_bound_small_layers():
    slow = Shares(launch=1.0)
    found = planned("quickstart", 1, device(), "model.vocab_size=512", "model.num_layers=2", shares=slow)
    assert found.parts["launches"] > 0.99 * sum(found.parts[name] for name in PER_MICRO_BATCH & found.parts.keys())


def test_kernels_and_selective_recomputation_pay_on_paper():
    """The goal of the GPU path: from about 9 % to 25 % of an H100's FLOP; docs/gpu.md has the figures."""
    hardware = find_hardware("h100x8")
    before = planned("engram-27b", 64, hardware, shares=Shares(), with_kernels=False)
    after = planned("engram-27b", 64, hardware, "train.recompute=selective", shares=Shares())
    assert before.mfu < 0.14
    assert after.mfu > 1.5 * before.mfu


def test_the_command(capsys):
    words = ["plan", "--config", "engram-27b", "--hardware", "h100x8", "--ranks", "64"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "a step of engram-27b on 64 ranks of h100x8: pipeline 8" in printed
    assert "MFU without it" in printed
    assert "Assumed, not measured" in printed
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert main([*words[:-1], "32", "--set", "parallel.pipeline=2"]) == 0
    assert "too little memory: the fullest rank needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--hardware", "tpu", "--ranks", "8"], "--hardware tpu: name one of a100, h100"),
        (["--hardware", "h100x0", "--ranks", "8"], "--hardware h100x0"),
        (["--hardware", "h100", "--ranks", "0"], "--ranks: at least 1"),
        (["--hardware", "h100", "--ranks", "12"], "parallel"),
    ],
)
def test_refusals(capsys, words, problem):
    assert main(["plan", "--config", "engram-27b", *words]) == 2
    assert problem in capsys.readouterr().err
