"""`kmem data cluster`."""

import argparse
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kmem.clustering.embedders import DEFAULT_KIND, KINDS, EmbedderOption
from kmem.config import UserError
from kmem.data.workers import available_cores
from kmem.files import FULL_DISK

if TYPE_CHECKING:
    from kmem.clustering.applying import Addressed

_OF_A_TREE = ("children", "levels", "unit", "embedder", "sample", "balance", "seed")
"""Options of a new tree. An existing tree has them already, so they are refused with --tree, as are its embedder's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Cluster the documents of prepared folders into a tree (k children per node, p levels) and store the leaf of "
        "each document with the data, or give folders the addresses of an existing tree. After an interruption the "
        "same command continues. See docs/bank.md."
    )
    parser.add_argument(
        "--data", nargs="+", type=Path, required=True, metavar="DIR", help="prepared folders, which get the addresses"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="TREE", help="make a tree from --data and write it here")
    target.add_argument("--tree", type=Path, metavar="TREE", help="use this existing tree")
    new = parser.add_argument_group("a new tree")
    new.add_argument("--children", type=int, metavar="K", help="children of each node (default: 16)")
    new.add_argument("--levels", type=int, metavar="P", help="levels; the tree has K^P leaves (default: 2)")
    new.add_argument(
        "--unit", metavar="HOW", help="what gets an address: document (default), or window:N for windows of N tokens"
    )
    kinds = ". ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
    new.add_argument("--embedder", choices=tuple(KINDS), help=f"{kinds}. (default: {DEFAULT_KIND})")
    for option, owners in _embedder_options().items():
        described = "; ".join(f"{owner}: {own.help}" for owner, own in owners.items())
        first = next(iter(owners.values()))
        new.add_argument(f"--{option}", type=first.parse, metavar=first.metavar, help=described)
    new.add_argument(
        "--sample", type=int, metavar="N", help="most units that a node's centroids are made from (default: 65536)"
    )
    new.add_argument(
        "--balance",
        type=float,
        metavar="X",
        help="a cluster above X times the even share is split with the smallest one (default: 1.5; 0: never)",
    )
    new.add_argument("--seed", type=int, help="seed of samples, centroids and splits (default: 1234)")
    cores = available_cores()
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default here: {cores})")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where an encoder computes (default: cpu)")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a tree, addresses of another tree, or interrupted work with other options",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: must be at least 1")
    missing = [name for name in ("sklearn", "scipy") if importlib.util.find_spec(name) is None]
    if missing and arguments.out is not None:
        raise UserError("kmem data cluster --out needs scikit-learn: pip install 'scikit-learn>=1.5,<2'")
    from kmem.clustering.report import print_tree

    try:
        done = _use(arguments) if arguments.out is None else _make(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped")
        raise
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = error.filename or arguments.out or arguments.data[0]
        raise UserError(f"{where}: {error.strerror}; make room, and the same command continues") from None
    print_tree(done)
    for folder in arguments.data:
        print(f"{folder}/addresses.json: up to date" if folder in done.unchanged else f"wrote {folder}/addresses.json")
    if arguments.out is not None:
        print(f"wrote {arguments.out}, tree {done.tree.fingerprint[:12]}")
    return 0


def _make(arguments: argparse.Namespace) -> "Addressed":
    from kmem.clustering.building import TreeRequest, make_tree
    from kmem.data.units import Unit

    chosen = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {name: chosen.pop(name) for name in _embedder_options() if name in chosen}
    for name, least in (("children", 2), ("levels", 1), ("sample", 1), ("seed", 0)):
        if chosen.get(name, least) < least:
            raise UserError(f"--{name} {chosen[name]}: must be at least {least}")
    balance = arguments.balance
    if balance is not None and not (balance == 0 or (math.isfinite(balance) and balance > 1)):
        raise UserError(f"--balance {balance}: must be above 1 (times the even share), or 0 to switch it off")
    if "unit" in chosen:
        chosen["unit"] = Unit.parse(chosen["unit"])
    return make_tree(TreeRequest(**chosen, options=options))


def _use(arguments: argparse.Namespace) -> "Addressed":
    from kmem.clustering.applying import apply_tree

    given = [f"--{name}" for name in (*_OF_A_TREE, *_embedder_options()) if getattr(arguments, name) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: only for a new tree; the tree of --tree has its own, so leave it out")
    return apply_tree(arguments.data, arguments.tree, arguments.workers, arguments.device, arguments.force)


def _embedder_options() -> dict[str, dict[str, EmbedderOption]]:
    """Name of an option -> kind of embedder that has it -> the kind's option."""
    owners: dict[str, dict[str, EmbedderOption]] = {}
    for name, kind in KINDS.items():
        for option in kind.options:
            owners.setdefault(option.name, {})[name] = option
    return owners
