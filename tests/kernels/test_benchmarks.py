"""The benchmark runs at tiny sizes anywhere, and says what it did not measure."""

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
    assert all(row["us"] is None and row["not_measured"] == "0 minutes had passed" for row in rows)
    assert done.stdout.count("not measured") == len(rows)
