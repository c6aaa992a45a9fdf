"""The benchmark runs at tiny sizes anywhere, and says what it did not measure."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "run.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_every_case_runs(tmp_path):
    done = run("--tiny", "--out", tmp_path / "new" / "tiny.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "tiny.json").read_text())
    assert {"device", "torch", "triton", "python"} <= set(report["environment"])
    assert all(value > 0 for value in report["ceilings"].values())
    kernels = {
        "route",
        "permute",
        "combine",
        "swiglu",
        "segment_reduce",
        "ngram_ids",
        "connection",
        "engram",
        "rotary",
        "cross_entropy",
        "MoE",
        "coarse",
        "row_gather",
        "row_update",
    }
    assert kernels <= {row["name"].split()[0] for row in report["measurements"]}
    for row in report["measurements"]:
        assert row["us"] > 0, row
        assert row["share_of_ceiling"] > 0, row
        assert row["meets_goal"] is None
        assert row["name"] in done.stdout
    assert "not measured" not in done.stdout
    ceilings = {row["ceiling"] for row in report["measurements"]}
    assert ceilings == {"GEMM", "copy", "host copy"}
    assert set(report["profiles"]) == {f"{kind}MoE layer forward + backward" for kind in ("", "coarse ")}


def test_what_was_not_measured_says_so(tmp_path):
    done = run("--tiny", "--minutes", 0, "--only", "route", "--out", tmp_path / "none.json")
    rows = json.loads((tmp_path / "none.json").read_text())["measurements"]
    assert rows
    assert all(row["us"] is None and "0 minutes" in row["not_measured"] for row in rows)
    assert done.stdout.count("not measured") == len(rows)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("run")


def test_no_case_begins_that_could_end_too_late(benchmark):
    now = [0.0]
    time_left = benchmark.TimeLeft(100.0, clock=lambda: now[0])
    for seconds, another in ((0, True), (30, True), (10, True), (29, True), (2, False)):
        now[0] += seconds
        assert time_left.for_one_more() is another, now
    assert time_left.passed() == 71


def test_a_goal_is_met_or_missed_in_its_own_unit(benchmark):
    from cases import Case, Goal

    ceilings = benchmark.Ceilings(1e12, 1e15, 1e11)

    def met(goal, seconds, **work):
        case = Case("case", "", "", lambda: [], goal=goal, **work)
        return benchmark.Measurement(case, seconds).meets_goal(ceilings)

    assert met(Goal(15, "us", at_most=True), 14.9e-6, bytes=1) is True
    assert met(Goal(15, "us", at_most=True), 15.1e-6, bytes=1) is False
    assert met(Goal(85, "%"), 1.0, bytes=int(0.86e12)) is True
    assert met(Goal(85, "%"), 1.0, bytes=int(0.84e12)) is False
    assert met(Goal(260, "TFLOP/s"), 1.0, flop=int(261e12)) is True
    assert met(Goal(260, "TFLOP/s"), 1.0, flop=int(259e12)) is False
    assert met(Goal(75, "%"), 1.0, flop=int(0.74e15)) is False
    assert met(Goal(15, "us", at_most=True), None, bytes=1) is None
    assert met(None, 1.0, bytes=1) is None


def test_a_profile_that_fails_leaves_the_figure(benchmark, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "profile", fail)
    measured, profile = benchmark.profiled(benchmark.Measurement(None, 1.5), None)
    assert (measured.seconds, profile) == (1.5, [])
    assert measured.reason.endswith(": RuntimeError: out of memory")
