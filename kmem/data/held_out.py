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
    """Split of a folder of data -> int32 [documents], the input of each document (its place in the manifest)."""
    counts = [source.documents for source in manifest.sources]
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    if manifest.options["validation_share"] is None:  # adopted data with inputs of its own for each split
        trained_on = manifest.splits["train"].documents
        by_split = {"train": source[:trained_on], "validation": source[trained_on:]}
    else:
        held_out = choose_held_out(len(source), manifest.options["validation_share"], manifest.options["seed"])
        by_split = {"train": source[~held_out], "validation": source[held_out]}
    assert all(len(by_split[split]) == record.documents for split, record in manifest.splits.items())
    return by_split
