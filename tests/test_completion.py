"""Completion as a shell asks for it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("kmem data pre", ["prepare "]),
        ("kmem train --config quickstart-", ["quickstart-bank", "quickstart-engram"]),
        ("kmem verify --no-such", []),
    ],
)
def test_commands_options_and_packaged_configs_are_completed(line, wanted):
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9", "COMP_LINE": line}
    asked |= {
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "0",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }
    answer = subprocess.run(
        [sys.executable, "-m", "kmem.cli"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (answer.returncode, answer.stdout.split("\n") if answer.stdout else []) == (0, wanted), answer.stderr
