"""Tables that describe a tree and the addresses it gave."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from kmem.clustering.applying import Addressed
from kmem.clustering.corpus import Corpus
from kmem.data.held_out import source_of_documents
from kmem.data.leaf_order import LeafOrder
from kmem.data.units import Unit

SEQUENCE_LENGTHS = (256, 512, 1024, 2048)
_MOST_SOURCES, _MOST_COLUMNS = 24, 16


def print_tree(done: Addressed) -> None:
    """Print tables of the levels, the clusters of level 1, the clusters of each source's text, and the addresses."""
    console = Console(width=max(Console().width, 110))
    for table in (_levels(done), _clusters(done), _sources(done), _data(done)):
        if table is not None:
            console.print(table)


def _levels(done: Addressed) -> Table:
    columns = _right("level", "clusters", "smallest", "median", "largest", "largest / even share", "Gini")
    table = Table(*columns, title="training units per cluster when the tree was made")
    for level, sizes in enumerate(done.tree.record["sizes"], 1):
        share = sizes["largest"] * sizes["clusters"] / done.tree.record["units"]
        numbers = [f"{sizes[name]:,.0f}" for name in ("clusters", "smallest", "median", "largest")]
        table.add_row(str(level), *numbers, f"{share:.2f}", f"{sizes['gini']:.2f}")
    return table


def _clusters(done: Addressed) -> Table:
    below = done.tree.children ** (done.tree.levels - 1)
    first = np.concatenate([splits["train"] for splits in done.leaves.values()]) // below
    counts = np.bincount(first, minlength=done.tree.children)
    words = "typical words in the data that the tree was made from"
    table = Table(*_right("cluster", "units", "share"), words, title="clusters of level 1, in this data")
    for cluster, (count, words) in enumerate(zip(counts, done.tree.record["words"], strict=True)):
        table.add_row(str(cluster), f"{count:,}", f"{count / counts.sum():.1%}", " ".join(words))
    return table


def source_counts(done: Addressed) -> dict[str, NDArray[np.int64]]:
    """Source -> its training units in each cluster of level 1, int64 [children].

    Sources are the files that the folders were prepared from, or the folders if there are many files.
    """
    unit, below = Unit.parse(done.tree.record["unit"]), done.tree.children ** (done.tree.levels - 1)
    files: dict[str, NDArray[np.int64]] = {}
    folders: dict[str, NDArray[np.int64]] = {}
    for folder, splits in done.leaves.items():
        corpus = Corpus.open(folder)
        first = splits["train"] // below
        folders[folder.name] = np.bincount(first, minlength=done.tree.children)
        documents = corpus.units("train", unit).documents
        source = source_of_documents(corpus.manifest)["train"][documents]
        for number, record in enumerate(corpus.manifest.sources):
            file = Path(record.path).name.split(".")[0]
            name = f"{folder.name}/{file}" if len(done.leaves) > 1 else file
            units = np.bincount(first[source == number], minlength=done.tree.children)
            files[name] = files.get(name, 0) + units
    return files if len(files) <= _MOST_SOURCES else folders


def _sources(done: Addressed) -> Table | None:
    """The table of sources and clusters; None if there is only one source."""
    counts = source_counts(done)
    if len(counts) < 2:
        return None
    best = np.stack([clusters / max(clusters.sum(), 1) for clusters in counts.values()]).max(axis=0).sum()
    wide = done.tree.children <= _MOST_COLUMNS
    table = Table(
        Column("source", no_wrap=True, min_width=min(max(map(len, counts)), 24)),
        *_right("units", *(map(str, range(done.tree.children)) if wide else ("largest",))),
        title="sources of the training units, and their share in each cluster of level 1, in %",
        caption=f"if all sources had the same size, the cluster would predict a unit's source in "
        f"{best / len(counts):.0%} of cases; {1 / len(counts):.0%} if clusters were independent of sources",
        min_width=100,
    )
    for name, clusters in counts.items():
        shares = [f"{100 * share:.0f}" if share else "" for share in clusters / max(clusters.sum(), 1)]
        if not wide:
            largest = [int(cluster) for cluster in np.argsort(-clusters, kind="stable")[:8] if clusters[cluster]]
            shares = ["  ".join(f"{cluster}: {shares[cluster]}" for cluster in largest)]
        table.add_row(name, f"{clusters.sum():,}", *shares)
    return table


def _data(done: Addressed) -> Table:
    unit = Unit.parse(done.tree.record["unit"])
    padded = [f"T={length:,}" for length in SEQUENCE_LENGTHS]
    table = Table(
        "data",
        *_right("training units", "held out", "leaves in use", *padded),
        title="addresses, and the padding of an epoch if a sequence of T tokens holds one leaf only",
    )
    for folder, splits in done.leaves.items():
        lengths = Corpus.open(folder).units("train", unit).lengths
        orders = [(LeafOrder(lengths, splits["train"], length, 0, None), length) for length in SEQUENCE_LENGTHS]
        padding = [order.padding / (order.spans_per_epoch * length) for order, length in orders]
        table.add_row(
            folder.name,
            f"{len(splits['train']):,}",
            f"{len(splits['validation']):,}",
            f"{len(np.unique(splits['train'])):,} of {done.tree.leaves:,}",
            *(f"{share:.1%}" for share in padding),
        )
    return table


def _right(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, justify="right") for name in names]
