"""`python -m tests.faults --minutes N --seed S`: attacks until the time is over, and a table of what happened."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from kmem.wording import print_table
from tests.faults import configurations, corruption, ranks, writing
from tests.faults.outcomes import BAD, OUTCOMES

Attacks = Callable[[Path, int], Iterator[tuple[str, str, str]]]
KINDS: dict[str, Attacks] = {
    "corruption": corruption.attacks,
    "writing": writing.attacks,
    "ranks": ranks.disagreements,
    "readers": ranks.beside,
    "configurations": configurations.configurations,
}


def main() -> int:
    """0 if no attack ended in a traceback or in silence."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first round; later ones count on")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="default: all, in equal time")
    arguments = parser.parse_args()
    if "writing" in arguments.kinds and not writing.CAN_MOUNT:
        print("full and read-only disks: left out, as this user may not mount one", file=sys.stderr)
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as root:
        each = 60 * arguments.minutes / len(arguments.kinds)
        for kind in arguments.kinds:
            until, seed = time.monotonic() + each, arguments.seed
            while time.monotonic() < until:
                for target, what, outcome in KINDS[kind](_folder(root, kind, seed), seed):
                    counts.setdefault(target, Counter())[outcome] += 1
                    if outcome in BAD:
                        print(f"{outcome}: {target}: {what} (seed {seed})", file=sys.stderr, flush=True)
                    if time.monotonic() > until:
                        break
                seed += 1
    rows = [
        [target, f"{found.total():,}", *(f"{found[name]:,}" for name in OUTCOMES)] for target, found in counts.items()
    ]
    print_table("attacks and what became of them", ("target", "tried", *OUTCOMES), sorted(rows))
    return 1 if any(found[name] for found in counts.values() for name in BAD) else 0


def _folder(root: str, kind: str, seed: int) -> Path:
    folder = Path(root) / f"{kind}-{seed}"
    folder.mkdir()
    return folder


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
