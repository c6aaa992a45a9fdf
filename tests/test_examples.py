"""The examples run as they are written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SHOWS = {
    "look_inside": "rows moved",
    "custom_callback": "worst_steps.json",
    "custom_memory": "layers.1.token_vectors.table",
}
"""Example -> a part of what it prints."""


@pytest.mark.full
@pytest.mark.parametrize("name", SHOWS)
def test_example(name, tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SHOWS[name] in done.stdout


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"small_corpus"} == SHOWS.keys()
