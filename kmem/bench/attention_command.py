"""`kmem bench attention`: attention within packed documents against the dense mask that defines it, and against plain
causal attention."""

import argparse
import os
from dataclasses import asdict, dataclass

from kmem.bench import options
from kmem.bench.machine import processor, versions
from kmem.wording import print_table

GOAL = 1.0
"""Share of the mask's time that packed documents may take."""
LENGTHS = (256, 1024, 4096)


@dataclass(frozen=True)
class AttentionMeasurement:
    """Forward and backward pass of one layer's attention, in ms, the best of the repeats."""

    length: int
    documents: int
    packed: float
    mask: float | None
    """None: not measured, since the mask would need too much memory."""
    causal: float
    """Of sequences of one document: no less work than documents have."""

    @property
    def met(self) -> bool | None:
        return None if self.mask is None else self.packed <= GOAL * self.mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=list(LENGTHS),
        metavar="T",
        help="tokens of a sequence (default: 256 ..)",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of a micro-batch, at least one sequence (4096)"
    )
    parser.add_argument("--document", type=int, default=200, help="mean tokens of a document (default: 200)")
    parser.add_argument("--heads", type=int, default=8, help="query heads; a quarter as many have keys (default: 8)")
    parser.add_argument("--width", type=int, default=64, help="values of a head (default: 64)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; bf16 on a GPU (default: cpu)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s here")
    parser.add_argument("--repeats", type=int, default=5, help="the best of this many counts (default: 5)")
    options.add_record_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    options.check_positive(arguments, "tokens", "document", "heads", "width", "threads", "repeats")
    from kmem.bench.attention import measure

    measured = [measure(length, arguments) for length in arguments.lengths]
    shape = (
        f"forward and backward of {arguments.tokens:,} tokens, {arguments.heads} heads of {arguments.width}, documents "
        f"of {arguments.document} tokens on average, {arguments.device}, {arguments.threads} threads, best of "
        f"{arguments.repeats}"
    )
    rows = [
        (
            f"{row.length:,}",
            f"{row.documents:,}",
            f"{row.packed:.2f}",
            "" if row.mask is None else f"{row.mask:.2f}",
            f"{row.causal:.2f}",
            "" if row.mask is None else f"{row.packed / row.mask:.2f}",
            f"{row.packed / row.causal:.2f}",
            {None: "", True: "met", False: "missed"}[row.met],
        )
        for row in measured
    ]
    columns = (
        "tokens",
        "documents",
        "packed, ms",
        "mask, ms",
        "causal, ms",
        "packed / mask",
        "packed / causal",
        "goal",
    )
    print_table(shape, columns, rows, 130, words=(7,))
    used = f"{versions('torch')}, {processor()}"
    print(used)
    record = {"shape": shape, "versions": used, "goal": GOAL, "measured": [asdict(row) for row in measured]}
    options.write_record(arguments, record)
    return 0
