"""`kmem bank`: lists, erases, replaces and merges the blocks of a bank."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.checkpoint.printing import print_table
from kmem.config import UserError
from kmem.wording import counted

if TYPE_CHECKING:
    from kmem.checkpoint.bank.editing import Edited
    from kmem.checkpoint.reader import CheckpointReader
    from kmem.model.bank_layout import BankLayout

PATHS = "clusters by their paths from the root down, such as 3 or 3.11; `generic` for the generic blocks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = _action(actions, "list", "sizes of the levels, what their blocks write, and which were never trained")
    listing.add_argument("paths", nargs="*", metavar="PATH", help=f"and of these and all below: {PATHS}")
    listing.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    erasing = _action(actions, "erase", "reset clusters to their initial blocks, which change nothing")
    erasing.add_argument("paths", nargs="+", metavar="PATH", help=PATHS)

    replacing = _action(actions, "replace", "take the blocks of clusters from another checkpoint")
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


def _action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=description)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN", help="run folder or one of its steps")
    return parser


def run(arguments: argparse.Namespace) -> int:
    return {"list": _list, "erase": _erase, "replace": _replace, "merge": _merge}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import the_layout
    from kmem.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(arguments.checkpoint)
    layout = the_layout(reader)
    levels, clusters = _figures(reader, layout, arguments.paths)
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


def _figures(
    reader: "CheckpointReader", layout: "BankLayout", paths: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of each level, and of the named clusters and all clusters below them that have blocks."""
    import torch

    from kmem.checkpoint.bank.hits import cluster_tokens, hit_figures, stored_hits
    from kmem.checkpoint.bank.rows import (
        GENERIC_PATH,
        cluster_path,
        held_rows,
        named_cluster,
        select,
        written_norms,
    )
    from kmem.model.bank_layout import layer_bank_name

    chosen = select(layout, list(paths), with_blocks=False)  # refuses paths outside the tree
    hits = stored_hits(reader)
    levels: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    for level in layout.levels:
        norms = written_norms(reader, layout, level)
        of_clusters = norms[: layout.clusters(level)]
        trained = of_clusters[of_clusters != 0]
        stored = reader.tensors[layer_bank_name(layout.layers[0], level)].dtype
        held = sum(map(len, held_rows(reader.config, layout, level)))
        levels.append(
            {
                "level": level,
                "clusters": layout.clusters(level),
                "rank": layout.ranks[level - 1],
                "values_per_cluster": layout.row_values(level),
                "bytes": held * layout.row_values(level) * stored.itemsize,
                "untouched": len(of_clusters) - len(trained),
                "mean_norm": float(trained.mean()) if len(trained) else 0.0,
                "largest_norm": float(of_clusters.max()),
                "generic_norm": float(norms[-1]) if layout.generic else None,
                "hits": None if hits is None else hit_figures(layout, hits, level),
            }
        )
        tokens = None
        if hits is not None:  # the last row belongs to the generic blocks
            tokens = torch.cat([cluster_tokens(layout, hits, level), hits[-1:]]).tolist()
        clusters += [
            {
                "path": cluster_path(layout, level, row),
                "level": level,
                "norm": float(norms[row]),
                "untouched": bool(norms[row] == 0),
                "tokens": None if tokens is None else tokens[row],
            }
            for row in chosen[level].nonzero().flatten().tolist()
        ]
    for level, number in sorted({named_cluster(layout, path) for path in paths if path != GENERIC_PATH}):
        if level not in layout.levels:  # a named cluster without blocks has tokens all the same
            counted_tokens = None if hits is None else int(cluster_tokens(layout, hits, level)[number])
            bare = {"norm": None, "untouched": None, "tokens": counted_tokens}
            clusters.append({"path": cluster_path(layout, level, number), "level": level, **bare})
    return levels, sorted(clusters, key=lambda cluster: int(cluster["level"]))


def _erase(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import erase

    reader = _opened(arguments.checkpoint)
    edited = erase(reader, arguments.out, arguments.paths, arguments.subtree)
    _report(reader, edited, "erased")
    return 0


def _replace(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import replace_blocks

    reader, other = _opened(arguments.checkpoint), _opened(arguments.source)
    edited = replace_blocks(reader, arguments.out, arguments.paths, arguments.subtree, other)
    _report(reader, edited, "replaced")
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.bank.editing import Source, merge

    if len(arguments.sources) < 2:
        raise UserError("--from: name at least two runs, each with its own option --from")
    sources = [Source(_opened(Path(run)), tuple(paths)) for run, *paths in arguments.sources]
    start = None if arguments.start is None else _opened(arguments.start)
    edited, remarks = merge(sources, arguments.out, start)
    for remark in remarks:
        print(remark)
    base = max((source.reader for source in sources), key=lambda reader: reader.step)
    print(f"everything else is from {base.folder}")
    _report(base, edited, "taken from the others")
    return 0


def _opened(path: Path) -> "CheckpointReader":
    from kmem.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(path)
    reader.verify()
    return reader


def _report(reader: "CheckpointReader", edited: "Edited", done: str) -> None:
    from kmem.checkpoint.bank.editing import the_layout
    from kmem.model.bank_layout import layer_bank_name

    layer = the_layout(reader).layers[0]
    for changed in edited.levels:
        size = changed.values * reader.tensors[layer_bank_name(layer, changed.level)].dtype.itemsize
        print(
            f"level {changed.level}: blocks of {counted(changed.clusters, 'cluster')} {done}, {changed.values:,} "
            f"values, {size / 1e6:,.3f} MB; norm of what they wrote before: {changed.norm:.4g}"
        )
    if not edited.levels:
        print("no block has changed")
    print(f"wrote {edited.checkpoint}")


def _norm(cluster: dict[str, Any]) -> str:
    if cluster["norm"] is None:
        return "no blocks (rank 0)"
    return "untouched" if cluster["untouched"] else f"{cluster['norm']:.4g}"
