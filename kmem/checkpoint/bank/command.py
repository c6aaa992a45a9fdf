"""`kmem bank`: lists, erases, replaces and merges the blocks of a bank."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.checkpoint.actions import add_action, open_checkpoint
from kmem.config import UserError
from kmem.wording import counted, print_table

if TYPE_CHECKING:
    from kmem.checkpoint.bank.editing import Edited

PATHS = "clusters by their paths from the root down, such as 3 or 3.11; `generic` for the generic blocks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = add_action(actions, "list", "sizes of the levels, what their blocks write, and which were never trained")
    listing.add_argument("paths", nargs="*", metavar="PATH", help=f"and of these and all below: {PATHS}")
    listing.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    erasing = add_action(actions, "erase", "reset clusters to their initial blocks, which change nothing")
    erasing.add_argument("paths", nargs="+", metavar="PATH", help=PATHS)

    replacing = add_action(actions, "replace", "take the blocks of clusters from another checkpoint")
    replacing.add_argument("paths", nargs="+", metavar="PATH", help=PATHS)
    replacing.add_argument(
        "--from", dest="source", required=True, type=Path, metavar="RUN", help="run folder or one of its steps"
    )

    for editing in (erasing, replacing):
        editing.add_argument("--subtree", action="store_true", help="with all clusters below them")
        editing.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to make")

    merging = actions.add_parser(
        "merge",
        help="join checkpoints that were trained on different clusters",
        description="Join checkpoints that were trained on different clusters with the same frozen anchor into one.",
    )
    merging.add_argument(
        "--from", dest="sources", action="append", nargs="+", required=True, metavar=("RUN", "PATH"),
        help="a run or one of its steps, and the subtrees to take from it; default: the subtrees whose text it has "
        "read (data.addresses.subtrees), else the clusters that it has trained. Give the option once for each run",
    )  # fmt: skip
    merging.add_argument(
        "--start", type=Path, metavar="RUN", help="checkpoint that all started from, if its bank had been trained"
    )
    merging.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to make")


def run(arguments: argparse.Namespace) -> int:
    return {"list": _list, "erase": _erase, "replace": _replace, "merge": _merge}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.layout import bank_layout
    from kmem.checkpoint.bank.rows import figures

    reader = open_checkpoint(arguments)
    layout = bank_layout(reader)
    levels, clusters = figures(reader, layout, arguments.paths)
    if arguments.json:
        tree = {"checkpoint": str(reader.folder), "step": reader.step, "kind": layout.kind, "levels": levels}
        print(json.dumps({**tree, **({"clusters": clusters} if arguments.paths else {})}))
        return 0
    rows = [
        (
            str(level["level"]),
            f"{level['clusters']:,}",
            str(level["rank"]),
            f"{level['values_per_cluster']:,}",
            f"{level['bytes'] / 1e6:,.1f}",
            f"{level['untouched']:,}",
            f"{level['mean_norm']:.4g}",
            f"{level['largest_norm']:.4g}",
            "" if level["generic_norm"] is None else f"{level['generic_norm']:.4g}",
            "" if level["hits"] is None else f"{level['hits']['gini']:.2f}",
        )
        for level in levels
    ]
    columns = ("level", "clusters", "rank", "values each", "MB", "untouched", "mean norm", "largest", "generic", "Gini")
    print_table(f"{layout.kind} blocks of {counted(len(layout.layers), 'layer')}, {reader.folder}", columns, rows)
    if reader.config.bank.hold == "subtrees":
        addresses = reader.config.data.addresses
        chosen = ", ".join((addresses and addresses.subtrees) or ())
        print(f"this checkpoint holds only the blocks of the subtrees {chosen}; kmem bank merge joins such parts")
    if clusters:
        shown = [
            (
                cluster["path"],
                str(cluster["level"]),
                _norm(cluster),
                "" if cluster["tokens"] is None else f"{cluster['tokens']:,}",
            )
            for cluster in clusters
        ]
        print_table("clusters", ("path", "level", "norm", "tokens"), shown)
    print(
        "norm: over the weights that write, in all layers; without untouched blocks. Gini: how unevenly tokens are "
        "spread over the clusters"
    )
    return 0


def _erase(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import erase

    _report(erase(open_checkpoint(arguments), arguments.out, arguments.paths, arguments.subtree), "erased")
    return 0


def _replace(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import replace_blocks
    from kmem.checkpoint.reader import CheckpointReader

    reader, other = open_checkpoint(arguments), CheckpointReader(arguments.source)
    _report(replace_blocks(reader, arguments.out, arguments.paths, arguments.subtree, other), "replaced")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import Source, merge
    from kmem.checkpoint.reader import CheckpointReader

    if len(arguments.sources) < 2:
        raise UserError("--from: name at least two runs, each with its own option --from")
    sources = [Source(CheckpointReader(Path(run)), tuple(paths)) for run, *paths in arguments.sources]
    start = None if arguments.start is None else CheckpointReader(arguments.start)
    edited, remarks = merge(sources, arguments.out, start)
    for remark in remarks:
        print(remark)
    base = max((source.reader for source in sources), key=lambda reader: reader.step)
    print(f"everything else is from {base.folder}")
    _report(edited, "taken from the others")
    return 0


def _report(edited: "Edited", done: str) -> None:
    checkpoint, levels = edited
    for changed in levels:
        print(
            f"level {changed.level}: blocks of {counted(changed.clusters, 'cluster')} {done}, {changed.values:,} "
            f"values, {changed.bytes / 1e6:,.3f} MB; norm of what they wrote before: {changed.norm:.4g}"
        )
    if not levels:
        print("no block has changed")
    print(f"wrote {checkpoint}")


def _norm(cluster: dict[str, Any]) -> str:
    if cluster["norm"] is None:
        return "no blocks (rank 0)"
    return "untouched" if cluster["untouched"] else f"{cluster['norm']:.4g}"
