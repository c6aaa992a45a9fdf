"""Which documents of a preparation are held out."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from kmem.data.manifest import Manifest


def choose_held_out(documents: int, share: float, seed: int) -> NDArray[np.bool_]:
    """[documents] whether a document is held out: those with the smallest of one random number per document.

    Args:
        documents: of all input files, in their order; two at least.
        share: of the documents; one document is held out at least, and one is not.
    """
    assert documents > 1
    count = min(max(round(documents * share), 1), documents - 1)
    key = hashlib.blake2b(f"{seed}/held out".encode(), digest_size=16).digest()
    drawn = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(documents)
    held_out = np.zeros(documents, dtype=bool)
    held_out[np.argsort(drawn, kind="stable")[:count]] = True
    return held_out


def source_of_documents(manifest: Manifest) -> dict[str, NDArray[np.int32]]:
    """Of each split of a prepared folder, the input file (its place in the manifest) that each document is from."""
    counts = [source.documents for source in manifest.sources]
    held_out = choose_held_out(sum(counts), manifest.options["validation_share"], manifest.options["seed"])
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    found = {"train": source[~held_out], "validation": source[held_out]}
    assert all(len(found[split]) == record.documents for split, record in manifest.splits.items())
    return found
