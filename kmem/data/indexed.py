"""Megatron-core's indexed dataset (.bin/.idx), the file format of prepared corpora."""

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.order import offsets_of


class IndexedTokens:
    """A split's tokens, memory-mapped: one flat stream and the place of each document in it.

    The .idx file is a binary header and three arrays, the .bin file raw tokens; nothing is unpickled.
    """

    def __init__(self, prefix: Path):
        """prefix: path without `.bin`/`.idx`.

        Raises:
            UserError: a file is missing or not an indexed dataset.
        """
        indexed_dataset = megatron_indexed_dataset()
        try:
            self._dataset = indexed_dataset.IndexedDataset(str(prefix), mmap=True)
            index = self._dataset.index
            ends = offsets_of(index.sequence_lengths)[index.document_indices]
            # A view of memory that the dataset unmaps when it is deleted, so it must not leave this object.
            self._stream = self._dataset.bin_reader.read(index.dtype, count=int(ends[-1]), offset=0)
        except (AssertionError, ValueError, IndexError, OSError) as error:
            raise UserError(
                f"{prefix}.bin, {prefix}.idx: not a Megatron indexed dataset ({error}); prepare the folder anew"
            ) from None
        self.starts: NDArray[np.int64] = ends[:-1]
        """[documents] where each document begins in the stream, in tokens."""
        self.lengths: NDArray[np.int64] = np.diff(ends)
        """[documents] tokens of each document, with its EOS."""

    def take(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """A copy of the token ids at these places of the stream."""
        return self._stream[places].astype(np.int64)


def megatron_indexed_dataset() -> ModuleType:
    """The module megatron.core.datasets.indexed_dataset, imported when it is first needed.

    The import loads most of Megatron-core (2.3 s in addition to torch on one core of a 2-core Xeon).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints about Apex and Transformer Engine, which other parts of it use
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
