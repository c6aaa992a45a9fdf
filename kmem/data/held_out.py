"""Which documents of a prepared corpus are held out."""

import numpy as np
from numpy.typing import NDArray

from kmem.data.manifest import Manifest
from kmem.data.order import random_order


def choose_held_out(documents: int, share: float, seed: int) -> NDArray[np.bool_]:
    """[documents] whether a document is held out. Each document draws a random number; the smallest are held out.

    Args:
        documents: number of documents in all input files, at least two.
        share: share of the documents to hold out. At least one document is held out, and at least one is not.
    """
    assert documents > 1
    count = min(max(round(documents * share), 1), documents - 1)
    held_out = np.zeros(documents, dtype=bool)
    held_out[random_order(f"{seed}/held out", documents)[:count]] = True
    return held_out


def source_of_documents(manifest: Manifest) -> dict[str, NDArray[np.int32]]:
    """Split of a prepared folder -> int32 [documents], the input file of each document (its place in the manifest)."""
    counts = [source.documents for source in manifest.sources]
    held_out = choose_held_out(sum(counts), manifest.options["validation_share"], manifest.options["seed"])
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    by_split = {"train": source[~held_out], "validation": source[held_out]}
    assert all(len(by_split[split]) == record.documents for split, record in manifest.splits.items())
    return by_split
