"""Runs of models with n-gram memory, as `kmem train` makes them: real text, a real tokenizer, processes over gloo."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.model.engram_reader import table_name
from tests.train.trainer_case import trainer_case

ENGRAM = {"layers": [1, 3], "heads": 2, "rows_per_head": 50, "row_dim": 8, "boundary": "document"}
WIDE = {"parallel__pipeline": 2, "parallel__expert": 2}


@pytest.fixture
def engram_run(run_config):
    def make(**changes):
        engram = {f"model__engram__{name}": value for name, value in ENGRAM.items()}
        return run_config(**{**engram, "model__hyper_connections__branches": 2, **changes})[0]

    return make


def records(tree, kind="step"):
    lines = (Path(tree["folder"]) / tree["name"] / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def curve(tree):
    return [(record["loss"], record["grad_norm"]) for record in records(tree)]


def table(tree, layer):
    return CheckpointReader(Path(tree["folder"]) / tree["name"]).read(table_name(layer))


@pytest.mark.parametrize("world", [1, 4])
def test_fetching_ahead_changes_no_bit(ranks, engram_run, world):
    """With evaluations and saves in between, which must not disturb the steps in flight."""
    trees = [
        engram_run(name=f"depth-{depth}", engram__prefetch_depth=depth, **(WIDE if world == 4 else {}))
        for depth in ((0, 1, 3) if world == 1 else (0, 2))
    ]
    for tree in trees:
        answers = ranks.run(world, trainer_case, tree)
        assert {answer["error"] for answer in answers} == {None}
    for tree in trees[1:]:
        assert curve(tree) == curve(trees[0])
        assert records(tree, "evaluation")[-1]["loss"] == records(trees[0], "evaluation")[-1]["loss"]
        for layer in ENGRAM["layers"]:
            assert torch.equal(table(tree, layer), table(trees[0], layer))


@pytest.mark.parametrize("world", [1, 4])
def test_resume_is_bit_identical(ranks, engram_run, world):
    mesh = WIDE if world == 4 else {}
    whole = engram_run(name="whole", **mesh)
    ranks.run(world, trainer_case, whole)
    halves = engram_run(name="halves", checkpoint__every=3, train__steps=3, **mesh)
    ranks.run(world, trainer_case, halves)
    halves["train"]["steps"] = 6
    answers = ranks.run(world, trainer_case, halves)
    assert [answer["started_at"] for answer in answers] == [3] * world
    assert curve(halves) == curve(whole)
    for layer in ENGRAM["layers"]:
        assert torch.equal(table(halves, layer), table(whole, layer))


def test_what_is_seen_while_training(ranks, engram_run):
    tree = engram_run(train__steps=30, evaluation__every=10)
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["error"] is None
    evaluations = records(tree, "evaluation")
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"] - 1
    for record in records(tree):
        assert set(record["memories"]["engram"]) == {"1", "3"}
        for figures in record["memories"]["engram"].values():
            tokens = 8 * 32
            assert figures["addresses"] == tokens * 4
            assert 0 < figures["touched_rows"] <= figures["unique_rows"] <= figures["addresses"]
            assert 0 <= figures["conflict_rows"] <= figures["unique_rows"]
            assert 0 < figures["touch_density"] < 1
            assert figures["dedup_ratio"] == figures["addresses"] / figures["unique_rows"]
            assert len(figures["gate_mean"]) == 2
            assert [sum(counts) for counts in figures["gate_histogram"]] == [tokens, tokens]
            assert figures["bytes"] == 0, "one rank has nobody to send to"
            sampled = record["step"] % 10 == 0
            assert (figures["collision_rate"] is not None) == sampled
            if sampled:
                assert len(figures["collision_rate"]) == 4
                assert all(0 < rate < 1 for rate in figures["collision_rate"])
                assert figures["row_norms"]["p1"] <= figures["row_norms"]["p50"] <= figures["row_norms"]["max"]
    assert any(figures["memories"]["engram"]["1"]["owner_ms"] > 0 for figures in records(tree))


def test_the_figures_of_a_mesh_are_those_of_one_rank(ranks, engram_run):
    """But for rows that several ranks ask for, and the time it takes. Four steps: later the curves part by more than
    rounding, where the gate of a token turns."""
    trees = [engram_run(name=name, train__steps=4, **mesh) for name, mesh in (("one", {}), ("four", WIDE))]
    ranks.run(1, trainer_case, trees[0])
    ranks.run(4, trainer_case, trees[1])
    for one, four in zip(*map(records, trees), strict=True):
        for layer in ("1", "3"):
            alone, spread = (record["memories"]["engram"][layer] for record in (one, four))
            for name in ("addresses", "touched_rows", "touch_density"):
                assert spread[name] == alone[name]
            assert spread["unique_rows"] > alone["unique_rows"]
            assert spread["gate_mean"] == pytest.approx(alone["gate_mean"], abs=1e-5)
            if alone["row_norms"]:
                assert spread["row_norms"] == pytest.approx(alone["row_norms"], rel=1e-3)
    assert sum(record["memories"]["engram"]["1"]["bytes"] for record in records(trees[1])) > 0


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__engram__rows_per_head": 10**12}, r"^engram\.store: .* GiB .*host memory.* GiB .*store=mmap"),
        ({"model__engram__rows_per_head": 10**13, "engram__store": "mmap"}, r"^table .* GiB .*\bdisk\b.* GiB "),
        (
            {"engram__store": "mmap", "engram__folder": "/proc/nowhere"},
            r"^engram\.folder: /proc/nowhere/case ",
        ),
    ],
    ids=["host", "disk", "folder"],
)
def test_a_table_that_does_not_fit_is_refused_on_every_rank(ranks, engram_run, changes, message):
    """Before training, with the numbers."""
    answers = ranks.run(2, trainer_case, engram_run(**changes))
    assert len({answer["error"] for answer in answers}) == 1
    assert re.search(message, answers[0]["error"])
    assert answers[0]["steps"] is None


def test_a_row_gradient_that_is_not_finite_stops_all_ranks(ranks, engram_run):
    """The backbone's gradients are finite; only the rows that one rank looked up are not."""
    tree = engram_run(checkpoint__every=1)
    answers = ranks.run(2, spoiled_case, tree)
    assert len({answer["error"] for answer in answers}) == 1
    assert re.match(
        r"step 4: .*gradient of .*rows .*\bcheckpoint of step 3\b.*train\.optimizer\.lr", answers[0]["error"]
    )
    (answer,) = ranks.run(1, trainer_case, tree)
    assert (answer["started_at"], answer["error"]) == (3, None)


def test_a_rank_that_is_gone_is_one_clear_error(ranks, engram_run):
    tree = engram_run(checkpoint__every=2, parallel__timeout_seconds=8)
    lost, _ = ranks.run(2, leaving_case, tree)
    assert re.match(r"after step 3: another rank .*\bcheckpoint of step 2\b", lost["error"])
    (answer,) = ranks.run(1, trainer_case, tree)
    assert (answer["started_at"], answer["steps"]) == (2, 6)


def leaving_case(tree):
    """Rank 1 takes its leave in the fourth step."""
    import torch.distributed as dist

    from kmem.config import UserError
    from kmem.parallel.engine import StepEngine

    forward, steps = StepEngine._exec_schedule, []

    def leaving(engine, schedule):
        if engine.module.training:
            steps.append(None)
            if len(steps) == 4 and dist.get_rank() == 1:
                raise UserError("gone")
        forward(engine, schedule)

    with mock.patch.object(StepEngine, "_exec_schedule", leaving):
        return trainer_case(tree)


def spoiled_case(tree):
    """In the fourth step one number of rank 1's row gradients becomes NaN."""
    import torch.distributed as dist

    from kmem.tables.working_set import WorkingSet

    finite, seen = WorkingSet.finite, []

    def spoiled(working_set):
        seen.append(working_set)
        if len(seen) == 7 and dist.get_rank() == 1:  # two tables, looked at once in a step
            working_set.gradient[0, 0] = float("nan")
        return finite(working_set)

    with mock.patch.object(WorkingSet, "finite", spoiled):
        return trainer_case(tree)


def test_memory_added_to_a_trained_run(ranks, engram_run, run_config):
    plain, _ = run_config(name="plain", train__steps=3)
    ranks.run(1, trainer_case, plain)
    source = str(Path(plain["folder"]) / "plain")
    changes = {"model__hyper_connections": None, "checkpoint__resume": source}
    added = engram_run(name="added", model__engram__init_std=0.0, **changes)
    (answer,) = ranks.run(1, trainer_case, added)
    assert (answer["started_at"], answer["steps"], answer["error"]) == (3, 6, None)
    longer, _ = run_config(name="longer", checkpoint__resume=source)
    ranks.run(1, trainer_case, longer)
    assert records(added)[0]["loss"] == records(longer)[0]["loss"], "the memory changes nothing at first"
    assert records(added)[2]["loss"] != records(longer)[2]["loss"]
