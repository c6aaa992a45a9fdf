"""`kmem bench rows`: gathers and row optimizers on the host against torch's, in one process."""

import argparse
import os
from dataclasses import asdict, dataclass

from kmem.bench import options
from kmem.bench.machine import processor, versions
from kmem.config import ROW_OPTIMIZER_TRAITS, RowOptimizerConfig
from kmem.wording import print_table

GOALS = {"adam_rate": 1.0, "adam_ratio": 8.0, "gather_share": 0.85}
"""For fp32 rows of 256 values: millions of rows per second and core; multiple of SparseAdam's speed; share of threads
times the peer's speed on one core."""
GOAL_DIM, GOAL_BYTES = 256, 1 << 28
"""Goals are for rows of this width and tables of at least this size."""


@dataclass(frozen=True)
class RowsMeasurement:
    """Rates in millions of rows per second, the best of the repeats."""

    work: str
    threads: int
    rate: float
    peer: str | None = None
    peer_rate: float | None = None
    """Rate of the peer on its own threads; the peer of a gather has one thread."""
    ratio: float | None = None
    """Lazy Adam: multiple of the peer's rate at equal threads. Gather: share of `threads` times the peer's rate on one
    core."""
    met: bool | None = None
    """Whether the goal is met; None if there is none for this work and shape, as for tables that caches could hold."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=500_000, help="rows of the table (default: 500000)")
    parser.add_argument("--touched", type=int, default=131_072, help="look-ups per step (default: 131072)")
    parser.add_argument("--dim", type=int, default=256, help="values per row (default: 256)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)),
        help="threads of both sides; Adam is measured with one thread too (default: all cores, %(default)s here)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="the best of this many counts (default: 5)")
    parser.add_argument(
        "--optimizers", action="store_true", help="also measure the update alone, for every row optimizer"
    )
    options.add_record_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    options.check_positive(arguments, "rows", "touched", "dim", "threads", "repeats")
    import torch

    from kmem.bench.rows import adam_rates, gather_rates, update_rate

    size = (arguments.rows, arguments.touched, arguments.dim)
    judged = arguments.dim == GOAL_DIM and arguments.rows * arguments.dim * 4 >= GOAL_BYTES
    measured = []
    for threads in sorted({1, arguments.threads}):
        ours, theirs = adam_rates(*size, threads, arguments.repeats)
        met = ours / threads >= GOALS["adam_rate"] and ours / theirs >= GOALS["adam_ratio"]
        judgement = met if judged else None
        measured.append(RowsMeasurement("lazy Adam", threads, ours, "SparseAdam", theirs, ours / theirs, judgement))
    ours, theirs = gather_rates(*size, arguments.threads, arguments.repeats)
    share = ours / theirs / arguments.threads
    judgement = share >= GOALS["gather_share"] if judged else None
    measured.append(
        RowsMeasurement("gather", arguments.threads, ours, "index_select(out=), 1 core", theirs, share, judgement)
    )
    for name in ROW_OPTIMIZER_TRAITS if arguments.optimizers else ():
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            unique = min(arguments.touched, arguments.rows)
            settings = RowOptimizerConfig(name=name, dense=False)
            rate = update_rate(arguments.rows, unique, settings, dtype, arguments.dim)
            measured.append(RowsMeasurement(f"update, {name} {label}", 1, rate))
    shape = (
        f"{arguments.touched:,} uniform look-ups in {arguments.rows:,} fp32 rows of {arguments.dim} values, "
        f"best of {arguments.repeats}"
    )
    _print(measured, shape)
    used = f"{versions('torch', 'numba', 'numpy')}, {processor()}"
    print(used)
    record = {"shape": shape, "versions": used, "goals": GOALS, "measured": [asdict(row) for row in measured]}
    options.write_record(arguments, record)
    return 0


def _print(measured: list[RowsMeasurement], shape: str) -> None:
    rows = [
        (
            row.work,
            str(row.threads),
            f"{row.rate:.3f}",
            f"{row.rate / row.threads:.3f}",
            row.peer or "",
            "" if row.peer_rate is None else f"{row.peer_rate:.3f}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            {None: "", True: "met", False: "missed"}[row.met],
        )
        for row in measured
    ]
    columns = ("work", "threads", "M rows/s", "per core", "peer", "M rows/s", "ratio", "goal")
    print_table(shape, columns, rows, 130, words=(0, 4, 7))
    print(
        f"lazy Adam deduplicates and sums, as its peer does. Goals for rows of {GOAL_DIM} values and at least "
        f"{GOAL_BYTES >> 20} MiB of rows:\n{GOALS['adam_rate']:.1f} M rows/s per core and {GOALS['adam_ratio']:.0f} "
        f"times SparseAdam at equal threads; gather {GOALS['gather_share']:.2f} of threads times the peer on one core"
    )
