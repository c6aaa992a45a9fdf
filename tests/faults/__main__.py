"""`python -m tests.faults --minutes N --seed S`: attacks until the time is over, and a table of what happened."""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kmem.wording import print_table
from tests.faults.corruption import attacks
from tests.faults.outcomes import OUTCOMES


def main() -> int:
    """0 if no attack ended in a traceback or in silence."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first round; later ones count on")
    arguments = parser.parse_args()
    until, seed = time.monotonic() + 60 * arguments.minutes, arguments.seed
    counts: dict[str, Counter[str]] = {}
    while time.monotonic() < until:
        with tempfile.TemporaryDirectory() as root:
            for target, what, outcome in attacks(Path(root), seed):
                counts.setdefault(target, Counter())[outcome] += 1
                if outcome in ("traceback", "silent"):
                    print(f"{outcome}: {target}: {what} (seed {seed})", file=sys.stderr, flush=True)
                if time.monotonic() > until:
                    break
        seed += 1
    rows = [
        [target, f"{found.total():,}", *(f"{found[name]:,}" for name in OUTCOMES)] for target, found in counts.items()
    ]
    print_table("attacks and what became of them", ("target", "tried", *OUTCOMES), sorted(rows))
    return 1 if any(found["traceback"] or found["silent"] for found in counts.values()) else 0


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
