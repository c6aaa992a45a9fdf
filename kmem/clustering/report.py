"""Tables that describe a tree and the addresses it gave."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmem.clustering.applying import Addressed
from kmem.clustering.corpus import Corpus
from kmem.data.held_out import source_of_documents
from kmem.data.leaf_order import LeafOrder
from kmem.data.units import Unit
from kmem.wording import print_table

SEQUENCE_LENGTHS = (256, 512, 1024, 2048)
_MOST_SOURCES, _MOST_COLUMNS = 24, 16


def print_tree(done: Addressed) -> None:
    """Print tables of the levels, the clusters of level 1, the clusters of each source's text, and the addresses."""
    _print_levels(done)
    _print_clusters(done)
    _print_sources(done)
    _print_data(done)


def _print_levels(done: Addressed) -> None:
    rows = []
    for level, sizes in enumerate(done.tree.record["sizes"], 1):
        share = sizes["largest"] * sizes["clusters"] / done.tree.record["units"]
        numbers = [f"{sizes[name]:,.0f}" for name in ("clusters", "smallest", "median", "largest")]
        rows.append((str(level), *numbers, f"{share:.2f}", f"{sizes['gini']:.2f}"))
    columns = ("level", "clusters", "smallest", "median", "largest", "largest / even share", "Gini")
    print_table("training units per cluster when the tree was made", columns, rows, words=())


def _print_clusters(done: Addressed) -> None:
    below = done.tree.children ** (done.tree.levels - 1)
    first = np.concatenate([splits["train"] for splits in done.leaves.values()]) // below
    counts = np.bincount(first, minlength=done.tree.children)
    rows = [
        (str(cluster), f"{count:,}", f"{count / counts.sum():.1%}", " ".join(words))
        for cluster, (count, words) in enumerate(zip(counts, done.tree.record["words"], strict=True))
    ]
    columns = ("cluster", "units", "share", "typical words in the data that the tree was made from")
    print_table("clusters of level 1, in this data", columns, rows, words=(3,))


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


def _print_sources(done: Addressed) -> None:
    """The table of sources and clusters, if there are several sources."""
    counts = source_counts(done)
    if len(counts) < 2:
        return
    wide = done.tree.children <= _MOST_COLUMNS
    rows = []
    for name, clusters in counts.items():
        shares = [f"{100 * share:.0f}" if share else "" for share in clusters / max(clusters.sum(), 1)]
        if not wide:
            largest = [int(cluster) for cluster in np.argsort(-clusters, kind="stable")[:8] if clusters[cluster]]
            shares = ["  ".join(f"{cluster}: {shares[cluster]}" for cluster in largest)]
        rows.append((name, f"{clusters.sum():,}", *shares))
    columns = ("source", "units", *(map(str, range(done.tree.children)) if wide else ("largest",)))
    title = "sources of the training units, and their share in each cluster of level 1, in %"
    print_table(title, columns, rows, width=140)
    best = np.stack([clusters / max(clusters.sum(), 1) for clusters in counts.values()]).max(axis=0).sum()
    print(
        f"if all sources had the same size, the cluster would predict a unit's source in {best / len(counts):.0%} of "
        f"cases; {1 / len(counts):.0%} if clusters were independent of sources"
    )


def _print_data(done: Addressed) -> None:
    unit = Unit.parse(done.tree.record["unit"])
    rows = []
    for folder, splits in done.leaves.items():
        lengths = Corpus.open(folder).units("train", unit).lengths
        orders = [(LeafOrder(lengths, splits["train"], length, 0, None), length) for length in SEQUENCE_LENGTHS]
        padding = [order.padding / (order.spans_per_epoch * length) for order, length in orders]
        numbers = (f"{len(splits['train']):,}", f"{len(splits['validation']):,}")
        in_use = f"{len(np.unique(splits['train'])):,} of {done.tree.leaves:,}"
        rows.append((folder.name, *numbers, in_use, *(f"{share:.1%}" for share in padding)))
    padded = [f"T={length:,}" for length in SEQUENCE_LENGTHS]
    columns = ("data", "training units", "held out", "leaves in use", *padded)
    print_table("addresses, and the padding of an epoch if a sequence of T tokens holds one leaf only", columns, rows)
