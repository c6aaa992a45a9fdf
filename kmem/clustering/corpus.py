"""Read the units of prepared folders in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmem.config import UserError
from kmem.data.bank_addresses import data_fingerprint
from kmem.data.indexed import IndexedTokens
from kmem.data.manifest import Manifest, parse_manifest, read_manifest
from kmem.data.tokenizer import check_tokenizer
from kmem.data.units import Unit, UnitMap

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Chunk:
    """Units start..stop-1 of a split of a folder."""

    folder: Path
    content: str
    """Fingerprint of the folder's tokens and documents."""
    split: str
    unit: Unit
    start: int
    stop: int
    tokens: int


@dataclass(frozen=True)
class Corpus:
    """A prepared folder."""

    folder: Path
    manifest: Manifest
    fingerprint: str
    """Identity of its tokens and documents."""

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """
        Raises:
            UserError: the folder is missing, unfinished or damaged.
        """
        manifest = read_manifest(folder)
        check_tokenizer(folder, manifest)
        return cls(folder, manifest, data_fingerprint(manifest))

    def units(self, split: str, unit: Unit) -> UnitMap:
        """The units of a split."""
        return _opened(self.folder, self.fingerprint, split, unit)[1]

    def chunks(self, split: str, unit: Unit, tokens: int) -> list[Chunk]:
        """All units of a split, in chunks of about `tokens` tokens (a unit is never cut)."""
        lengths = self.units(split, unit).lengths
        ends = np.cumsum(lengths)
        chunks, start, before = [], 0, 0
        while start < len(lengths):
            stop = max(int(np.searchsorted(ends, before + tokens, side="right")), start + 1)
            chunks.append(Chunk(self.folder, self.fingerprint, split, unit, start, stop, int(ends[stop - 1]) - before))
            start, before = stop, int(ends[stop - 1])
        return chunks


def open_corpora(folders: Sequence[Path]) -> list[Corpus]:
    """
    Raises:
        UserError: a folder holds no prepared corpus, or is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UserError(f"--data {folder}: named twice; leave one out")
    return [Corpus.open(folder) for folder in folders]


def read_chunk(chunk: Chunk, chosen: NDArray[np.int64] | None = None) -> list[Tensor]:
    """Token ids of each unit, int64 [tokens].

    Args:
        chosen: indices into the chunk of the units to read; None: all.
    """
    numbers = np.arange(chunk.start, chunk.stop)
    numbers = numbers if chosen is None else numbers[chosen]
    return read_units(chunk.folder, chunk.content, chunk.split, chunk.unit, numbers)


def read_units(folder: Path, content: str, split: str, unit: Unit, numbers: NDArray[np.int64]) -> list[Tensor]:
    """Token ids of the units of a split with these numbers, int64 [tokens] each."""
    indexed, units = _opened(folder, content, split, unit)
    return [
        torch.from_numpy(indexed.take(np.arange(start, start + length)))
        for start, length in zip(units.starts[numbers], units.lengths[numbers], strict=True)
    ]


@lru_cache(maxsize=4)
def _opened(folder: Path, content: str, split: str, unit: Unit) -> tuple[IndexedTokens, UnitMap]:
    indexed = IndexedTokens.of_split(folder, parse_manifest(folder), split)
    return indexed, UnitMap(indexed.starts, indexed.lengths, unit)
