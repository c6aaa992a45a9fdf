"""The kernels compile for a GPU, here without one, into what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {
    "_route",
    "_route_backward",
    "_count_choices",
    "_place_choices",
    "_scatter",
    "_gather_sum",
    "_combine_backward",
    "_running_sums",
    "_ngram_ids",
    "_row_gather",
    "_adam",
    "_rowwise_adagrad",
    "_square_norms",
    "_silu_times",
    "_silu_times_backward",
    "_cross_entropy",
    "_rotate",
    "_gate",
    "_gate_scores_backward",
    "_gate_streams_backward",
    "_scales",
    "_convolved",
    "_sums_backward",
    "_norm_dots",
    "_inputs_backward",
    "_read",
    "_read_backward",
    "_weight_gradient",
    "_write",
    "_write_backward",
}
SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on an H100."""
MOVES = ("_scatter", "_gather_sum", "_combine_backward", "_silu_times", "_silu_times_backward")


@pytest.mark.parametrize("options", [[], pytest.param(["--all"], marks=pytest.mark.full)], ids=["some", "all"])
def test_kernels_compile_without_atomics_on_floats(tmp_path, options):
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {facts["kernel"] for facts in compiled} == KERNELS
    for facts in compiled:
        assert facts["shared"] <= SHARED_MEMORY, facts
        assert facts["stack"] <= 16, facts  # so that no loop waits for spilled registers
        if facts["kernel"] == "_route":  # its counts are integers
            assert facts["atomics"]
            assert all(name.endswith((".u64", ".s64", ".b64")) for name in facts["atomics"]), facts
        else:
            assert facts["atomics"] == [], facts
    for kernel in MOVES:  # rows of a multiple of 16 bytes move 16 bytes at a time
        assert any(facts["wide_loads"] and facts["wide_stores"] for facts in compiled if facts["kernel"] == kernel)
    for facts in compiled:
        if facts["kernel"] == "_row_gather":  # every one, at any width
            assert facts["wide_loads"], facts
            assert facts["wide_stores"], facts
            assert facts["narrow"] == [], facts
        if facts["kernel"] in ("_adam", "_rowwise_adagrad"):
            # IEEE operations, one rounding each, denormal numbers kept: the bits of the host.
            assert facts["inexact"] == [], facts
            assert facts["wide_loads"], facts
            assert facts["wide_stores"], facts
