"""Configurations of any content, read by `kmem train --print-config` and `--dry-run`."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from hypothesis import Phase, given, seed, settings

from tests.config.test_fuzz import FAST, changed
from tests.faults.outcomes import Ran, failed, run

HANGS = 20.0
"""Seconds after which a command counts as hanging."""


def configurations(root: Path, number: int) -> Iterator[tuple[str, str, str]]:
    """(command, the file's content, outcome) of configurations drawn from a seed, without end."""
    draw = random.Random(number)
    while True:
        for tree in _drawn(draw.randrange(1 << 32)):
            path = root / "fuzzed.yaml"
            path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
            words = draw.choice(("--print-config", "--dry-run"))
            began = time.monotonic()
            ran = run(["train", "--config", str(path), words])
            yield f"configuration, train {words}", str(tree), outcome(ran, time.monotonic() - began)


def outcome(ran: Ran, seconds: float) -> str:
    if failed(ran):
        return "traceback"
    if seconds > HANGS:
        return "stuck"
    return "clean" if ran.code else "same"


def _drawn(number: int) -> list[object]:
    found: list[object] = []

    @seed(number)
    @settings(FAST, max_examples=100, derandomize=False, phases=[Phase.generate])
    @given(tree=changed())
    def collect(tree: object) -> None:
        found.append(tree)

    collect()
    return found
