"""`kmem bench experts` at sizes that say nothing about speed."""

import json
import re
import statistics

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kmem.bench import expert_backends, experts
from kmem.bench.expert_features import ExpertHalf, Feature, feature_costs, features, saved_bytes, with_feature
from kmem.bench.experts import check_equal, forward_backward, layer_input, our_layer, peer_layer
from kmem.bench.training import EXPERT_IMPLEMENTATIONS
from kmem.cli import main
from kmem.config import ConfigError, UserError, load_config
from kmem.model.swiglu import swiglu

TINY = [
    "model.hidden_size=32",
    "model.attention.num_heads=2",
    "model.moe.intermediate_size=16",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
    "data.sequence_length=24",
]


@pytest.fixture
def config():
    return load_config("bench/train", TINY)


def test_all_implementations_of_the_peer_are_equal_to_kmem(config):
    found = check_equal(config, {name: peer_layer(config, name) for name in EXPERT_IMPLEMENTATIONS})
    assert list(found) == list(EXPERT_IMPLEMENTATIONS)
    assert max(found.values()) < experts.LARGEST_DIFFERENCE


@pytest.mark.parametrize("place", range(3))
def test_a_peer_of_other_weights_is_refused(config, place):
    peer = peer_layer(config, "eager")
    with torch.no_grad():
        peer.weights[place].view(-1)[:40] *= 1.01
    with pytest.raises(UserError, match=r"^eager block .*kmem.* 1e-05: "):
        check_equal(config, {"eager block": peer})


def test_a_peer_that_gives_no_numbers_is_refused(config):
    peer = peer_layer(config, "eager")
    peer.module.register_forward_hook(lambda module, taken, out: out * float("nan"))
    with pytest.raises(UserError, match=r"^peer .*output nan"):
        check_equal(config, {"peer": peer})


def test_nothing_is_timed_against_a_wrong_peer(monkeypatch, capsys):
    real = experts.peer_layer

    def wrong(config, implementation):
        layer = real(config, implementation)
        layer.module.register_forward_hook(lambda module, taken, out: out * 1.001)
        return layer

    monkeypatch.setattr(experts, "peer_layer", wrong)
    monkeypatch.setattr("kmem.bench.experts_command.run_in_turn", lambda *rest, **named: pytest.fail("was timed"))
    assert main(["bench", "experts", "--set", *TINY]) == 2
    assert re.search(r"\(eager\) .*kmem.* 1e-05: output 1\.0e-03", capsys.readouterr().err)


def test_every_pass_has_gradients_of_its_own(config):
    layer, (hidden, gradient) = our_layer(config), layer_input(config)
    leaves = (hidden, *layer.weights)
    first = forward_backward(layer.module, leaves, gradient)
    gradients = [leaf.grad.clone() for leaf in leaves]
    assert forward_backward(layer.module, leaves, gradient).equal(first)
    assert all(leaf.grad.equal(gradient) for leaf, gradient in zip(leaves, gradients, strict=True))


@pytest.mark.full
def test_both_sides_are_timed_in_turn(tmp_path, capsys):
    record = tmp_path / "experts.json"
    rounds = ["--rounds", "2", "--steps", "1", "--threads", "1", "--profile", "--json", str(record)]
    assert main(["bench", "experts", "--set", *TINY, *rounds]) == 0
    found = json.loads(record.read_text())
    assert "hidden 32, 16 experts of width 16, top-2, batch 2 x 24, fp32" in found["workload"]
    names = [f"Qwen3MoeSparseMoeBlock ({name})" for name in EXPERT_IMPLEMENTATIONS]
    assert list(found["differences"]) == list(found["tried_seconds"]) == names
    assert next(iter(found["seconds"])) == "kmem"
    assert set(found["ratios"]) == set(found["seconds"]) - {"kmem"}
    assert set(found["ratios"]) <= set(names)
    for name, ratios in found["ratios"].items():
        assert ratios == [b / a for a, b in zip(found["seconds"]["kmem"], found["seconds"][name], strict=True)]
    assert found["ratio"] == min(statistics.median(ratios) for ratios in found["ratios"].values())
    assert found["ratio"] == statistics.median(found["ratios"][found["peer"]])
    assert (found["goal"], found["met"]) == (1.5, None)  # the goal is for the shape of bench/train
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert "aten::" in printed
    assert f"ratio: {found['ratio']:.3f}" in printed


def test_costs_are_those_of_the_layer_with_the_feature(config):
    chosen = [Feature("", "plain", {}), Feature("", "chain", {"top_k": 1, "chain": {"iterations": 2}})]
    chosen += [Feature("", "recomputed", {}, recompute=True), Feature("", "branches", {}, branches=4)]
    plain, chain, recomputed, branches = feature_costs(config, chosen, rounds=1)
    hidden, expert, tokens = 32, 3 * 32 * 16, 48
    assert plain.parameters == 16 * expert + 16 * hidden + hidden
    assert plain.active_parameters == 2 * expert + 16 * hidden + hidden
    assert (plain.expert_calls, chain.expert_calls) == (2, 2)
    assert chain.parameters == plain.parameters + 16 * hidden + hidden  # a second router and norm
    assert recomputed.saved_bytes == tokens * hidden * 4  # the input alone
    assert recomputed.parameters == plain.parameters
    assert branches.saved_bytes > plain.saved_bytes + 3 * tokens * hidden * 4
    assert all(cost.ms > 0 and cost.times > 0 for cost in (plain, chain, recomputed, branches))


def test_recomputation_and_statistics_change_no_output(config):
    hidden = torch.randn(2, 24, 32)
    layers = [ExpertHalf(config, Feature("", "", {}, **kind)) for kind in ({}, {"recompute": True}, {"observe": True})]
    expected, *others = (layer(hidden) for layer in layers)
    assert all(other.equal(expected) for other in others)


def test_saved_bytes_count_storages_once_and_no_parameters():
    linear = nn.Linear(8, 16)
    hidden = torch.randn(4, 8, requires_grad=True)
    assert saved_bytes(linear, hidden) == 4 * 8 * 4
    assert saved_bytes(nn.Sequential(linear, nn.Sigmoid()), hidden) == 4 * 8 * 4 + 4 * 16 * 4

    class Gated(nn.Module):
        def forward(self, x):
            return swiglu(linear(x))

    assert saved_bytes(Gated(), hidden) == 4 * 8 * 4 + 4 * 16 * 4 + 16 * 8 * 4  # its weight is not Gated's own
    assert saved_bytes(lambda_module(lambda x: checkpoint(linear, x, use_reentrant=False)), hidden) == 4 * 8 * 4


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


def test_features_that_a_shape_lacks_are_left_out(config):
    whole = {feature.name for feature in features(config)}
    assert {"plain", "top_k 8", "64 of the same width", "top-1 of 8 of width 256".replace("256", "32")} <= whole
    single = load_config("bench/train", [*TINY, "model.moe.top_k=1", "model.moe.num_experts=2"])
    fewer = {feature.name for feature in features(single)}
    assert "top_k 4" not in fewer
    assert not any("equal calls" in name for name in fewer)
    assert "double calls" in fewer


def test_the_base_of_features_is_plain(config):
    busy = load_config("bench/train", [*TINY, "model.moe.aux_loss=1", "model.moe.chain={iterations: 2}"])
    plain = with_feature(busy, Feature("", "plain", {}))
    assert plain.model.moe == with_feature(config, Feature("", "plain", {})).model.moe
    assert plain.model.num_layers == 1


def test_features_are_printed_and_recorded(tmp_path, capsys, monkeypatch):
    few = [Feature("", "plain", {}), Feature("balance", "z_loss", {"z_loss": 0.1})]
    monkeypatch.setattr("kmem.bench.expert_features.features", lambda config: few)
    record = tmp_path / "features.json"
    threads = torch.get_num_threads()
    arguments = ["--features", "--rounds", "3", "--threads", "1", "--json", str(record)]
    assert main(["bench", "experts", "--set", *TINY, *arguments]) == 0
    assert torch.get_num_threads() == threads
    plain, z_loss = json.loads(record.read_text())["costs"]
    assert (plain["feature"], z_loss["subject"], z_loss["feature"]) == ("plain", "balance", "z_loss")
    assert z_loss["spread"][0] <= z_loss["times"] <= z_loss["spread"][1]
    printed = capsys.readouterr().out
    assert "z_loss" in printed
    assert "saved MiB" in printed


@pytest.mark.parametrize("groups", ["even", "zipf"])
def test_groups_of_backends_hold_all_rows(groups):
    counts = expert_backends._counts(5, 5 * 7, groups)
    assert counts.sum() == 35
    assert counts.diff().max() <= 0


def test_backends_are_printed_and_recorded(tmp_path, capsys, monkeypatch):
    reasons = {"deepspeed": "it needs a GPU", "liger": "it is not installed"}
    monkeypatch.setattr("kmem.model.expert_backends.problem", lambda name, device, dtype: reasons.get(name))
    record = tmp_path / "backends.json"
    arguments = ["--backends", "--rounds", "2", "--threads", "1", "--json", str(record)]
    assert main(["bench", "experts", "--set", *TINY, *arguments]) == 0
    found = json.loads(record.read_text())
    assert found["not_measured"] == reasons
    assert {time["backend"] for time in found["backends"]} == {"grouped_mm", "loop"}
    assert {time["rows"] for time in found["backends"]} == set(expert_backends.GROUP_SIZES)
    assert all(time["times"] == 1 for time in found["backends"] if time["backend"] == "grouped_mm")
    assert re.search(f"deepspeed .*{reasons['deepspeed']}", capsys.readouterr().out)


def test_a_wrong_backend_is_not_timed(config, monkeypatch):
    real = expert_backends.find_backend

    def find(name):
        factor = 1.001 if name == "loop" else 1
        return lambda *given: real(name)(*given) * factor

    monkeypatch.setattr(expert_backends, "find_backend", find)
    monkeypatch.setattr(expert_backends, "in_turn", lambda *rest: pytest.fail("was timed"))
    with pytest.raises(UserError, match=r"^loop .*grouped_mm .*1\.0e-03"):
        expert_backends.backend_times(config, ["grouped_mm", "loop"], torch.device("cpu"), 1, sizes=[8])


@pytest.mark.parametrize(
    "override", ["score_function=sigmoid", "num_shared_experts=1", "z_loss=0.1", "chain={iterations: 2}"]
)
def test_what_the_peer_lacks_is_refused(override):
    config = load_config("bench/train", [*TINY, f"model.moe.{override}"])
    with pytest.raises(ConfigError, match=rf"^model\.moe\.{override.split('=')[0]}: "):
        peer_layer(config, "eager")


def test_what_cannot_be_measured_is_refused(capsys):
    assert main(["bench", "experts", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
    assert main(["bench", "experts", "--set", "train.precision=bf16"]) == 2
    assert "train.precision" in capsys.readouterr().err
    assert main(["bench", "experts", "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err
    dense = ["model.moe=null", "model.intermediate_size=64"]
    assert main(["bench", "experts", "--set", *dense]) == 2
    assert "model.moe" in capsys.readouterr().err
