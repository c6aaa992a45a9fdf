"""`kmem bench fetch`: milliseconds and bytes to fetch a context's blocks, with levels in host memory and on disk."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kmem.bench import options
from kmem.bench.machine import processor
from kmem.config import ConfigError, UserError
from kmem.wording import counted, print_table

if TYPE_CHECKING:
    from kmem.bench.fetch import Placement, TimedBank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="exported folder; default: random blocks of the shape below"
    )
    parser.add_argument("--contexts", type=int, default=15, metavar="N", help="contexts of each kind (default: 15)")
    parser.add_argument(
        "--placement", metavar="L=PLACE,..", help="where levels are kept, such as 1=ram,2=disk; a level that is not "
        "named is on disk (default: all on disk, then level 1 in memory, then all in memory)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="seed of the contexts (default: 1234)")
    shape = parser.add_argument_group(
        "without --model", "bf16 FFN blocks of the published 160M anchor, in a small tree"
    )
    shape.add_argument("--layers", type=int, default=35, help="default: 35")
    shape.add_argument("--width", type=int, default=512, help="default: 512")
    shape.add_argument("--levels", default="256,64,16", metavar="R,R", help="ranks of the levels (default: 256,64,16)")
    shape.add_argument("--children", type=int, default=4, help="children of each node (default: 4)")
    shape.add_argument(
        "--folder", type=Path, default=Path("runs"), help="folder for the blocks, on a disk (default: runs)"
    )
    options.add_record_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from kmem.bench.fetch import open_bank, synthetic_bank

    options.check_positive(arguments, "contexts", "layers", "width", "children")
    if arguments.model is not None:
        _measure(arguments, open_bank(arguments.model))
        return 0
    ranks = arguments.levels.split(",")
    if not all(rank.strip().isdecimal() for rank in ranks) or not any(map(int, ranks)):
        raise ConfigError(f"--levels {arguments.levels}: write ranks joined by commas, such as 256,64,16")
    shape = (arguments.layers, arguments.width, tuple(map(int, ranks)), arguments.children)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-fetch-", dir=arguments.folder) as scratch:
        _measure(arguments, synthetic_bank(Path(scratch), *shape))
    return 0


def placements(text: str | None, levels: Sequence[int]) -> "list[Placement]":
    """The placements to measure: where each level is kept.

    Raises:
        ConfigError: the text is not a placement, or names a level that the bank does not have.
    """
    if text is None:
        chosen = [set(), {levels[0]}, set(levels)]
        return [{level: "ram" if level in some else "disk" for level in levels} for some in chosen]
    placement: Placement = dict.fromkeys(levels, "disk")
    for part in text.split(","):
        name, _, place = part.partition("=")
        if not name.strip().isdecimal() or place not in ("ram", "disk"):
            raise ConfigError(f"--placement {text}: write levels and places, such as 1=ram,2=disk")
        if int(name) not in levels:
            raise ConfigError(f"--placement {text}: this bank has blocks on levels {', '.join(map(str, levels))}")
        placement = {**placement, int(name): "ram" if place == "ram" else "disk"}
    return [placement]


def _measure(arguments: argparse.Namespace, bank: "TimedBank") -> None:
    import torch

    from kmem.bench.fetch import CONTEXT_TOKENS, bytes_needed, measure, route_ms
    from kmem.tables.stores import available_host_memory, gib

    layout = bank.layout
    chosen = placements(arguments.placement, layout.levels)
    for placement in chosen:
        needed, free = bytes_needed(bank, placement), available_host_memory()
        if needed > free:
            raise UserError(
                f"--placement: {gib(needed)} in memory, but {gib(int(free))} are free; leave levels on disk"
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = torch.empty(0, dtype=next(iter(bank.rows.values())).dtype, device=device)
    shape = (
        f"{layout.kind} blocks of {counted(len(layout.layers), 'layer')}, ranks {list(layout.ranks)}, "
        f"{layout.children} children, {like.dtype}, to {device}; "
        f"{counted(arguments.contexts, 'context')} of each kind, medians"
    )
    times = [measure(bank, placement, arguments.contexts, arguments.seed, like) for placement in chosen]
    routing = route_ms(bank, arguments.contexts, arguments.seed)
    levels = [f"level {level.level}: ms" for level in times[0].levels]
    columns = ("levels", *levels, "new topic: ms", "MB", "same level 1: ms", "MB", "faster by")
    rows = [
        (
            measured.placement,
            *(f"{level.ms:.2f} ({level.bytes / 1e6:.2f} MB)" for level in measured.levels),
            f"{measured.all_ms:.2f}",
            f"{measured.all_bytes / 1e6:.2f}",
            f"{measured.deep_ms:.2f}",
            f"{measured.deep_bytes / 1e6:.2f}",
            f"{measured.all_ms / measured.deep_ms:.1f}x" if measured.deep_ms else "",
        )
        for measured in times
    ]
    print_table(shape, columns, rows, 150)
    print("new topic: all rows are read; same level 1: the row of level 1 is kept and only deeper rows are read")
    if routing is not None:
        print(f"embedding a context of {CONTEXT_TOKENS} tokens and descending the tree: {routing:.2f} ms")
    machine = f"torch {torch.__version__}, {processor()}"
    print(f"pages of levels on disk are dropped before every fetch (posix_fadvise); {machine}")
    measured = [asdict(placement_times) for placement_times in times]
    options.write_record(arguments, {"shape": shape, "machine": machine, "route_ms": routing, "measured": measured})
