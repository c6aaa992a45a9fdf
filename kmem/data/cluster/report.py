"""What a person sees of a tree."""

from pathlib import Path
from typing import Any

import numpy as np

from kmem.data.cluster.building import Addressed
from kmem.data.cluster.corpus import Corpus
from kmem.data.leaf_order import LeafOrder
from kmem.data.units import Unit

SEQUENCE_LENGTHS = (256, 512, 1024, 2048)


def print_tree(done: Addressed) -> None:
    """Tables of the levels, of the clusters of the first, and of the data's addresses."""
    from rich.console import Console

    console = Console(width=max(Console().width, 110))
    for table in (_levels(done), _clusters(done), _data(done)):
        console.print(table)


def padding_share(folder: Path, unit: Unit, leaves: Any, sequence_length: int) -> float:
    """Share of an epoch's positions that hold no token where sequences keep to one leaf."""
    order = LeafOrder(Corpus.open(folder).units("train", unit).lengths, leaves, sequence_length, 0, None)
    return order.padding / (order.spans_per_epoch * sequence_length)


def _levels(done: Addressed) -> Any:
    from rich.table import Table

    table = Table(title="training units per cluster, as the tree was made")
    for name in ("level", "clusters", "smallest", "median", "largest", "largest / even share", "Gini"):
        table.add_column(name, justify="right")
    for level, sizes in enumerate(done.tree.record["sizes"], 1):
        share = sizes["largest"] * sizes["clusters"] / done.tree.record["units"]
        numbers = [f"{sizes[name]:,.0f}" for name in ("clusters", "smallest", "median", "largest")]
        table.add_row(str(level), *numbers, f"{share:.2f}", f"{sizes['gini']:.2f}")
    return table


def _clusters(done: Addressed) -> Any:
    from rich.table import Table

    below = done.tree.children ** (done.tree.levels - 1)
    first = np.concatenate([splits["train"] for splits in done.leaves.values()]) // below
    counts = np.bincount(first, minlength=done.tree.children)
    table = Table(title="clusters of level 1, in this data")
    table.add_column("cluster", justify="right")
    table.add_column("units", justify="right")
    table.add_column("share", justify="right")
    table.add_column("typical words of the data the tree was made from")
    for cluster, (count, words) in enumerate(zip(counts, done.tree.record["words"], strict=True)):
        table.add_row(str(cluster), f"{count:,}", f"{count / counts.sum():.1%}", " ".join(words))
    return table


def _data(done: Addressed) -> Any:
    from rich.table import Table

    unit = Unit.parse(done.tree.record["unit"])
    table = Table(title="addresses; and the padding of an epoch, were sequences to keep to one leaf")
    table.add_column("data")
    for name in ("training units", "held out", "leaves in use", *(f"T={length:,}" for length in SEQUENCE_LENGTHS)):
        table.add_column(name, justify="right")
    for folder, splits in done.leaves.items():
        padding = [padding_share(folder, unit, splits["train"], length) for length in SEQUENCE_LENGTHS]
        table.add_row(
            folder.name,
            f"{len(splits['train']):,}",
            f"{len(splits['validation']):,}",
            f"{len(np.unique(splits['train'])):,} of {done.tree.leaves:,}",
            *(f"{share:.1%}" for share in padding),
        )
    return table
