"""Megatron-core's indexed dataset (.bin/.idx), the file format of prepared corpora.

The .bin file holds raw tokens, the .idx file a header and three arrays; nothing is unpickled. kmem reads and writes the
format itself, since importing Megatron-core takes 4 s of CPU time beside PyTorch. Tests compare with Megatron's code.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.manifest import HELD_OUT_NAME, Manifest
from kmem.data.order import offsets_of

_HEADER = struct.Struct("<9sQBQQ")
"""Mark, version, code of the tokens' type, sequences, and documents plus one."""
_MARK, _VERSION = b"MMIDIDX\x00\x00", 1
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_MOST_TOKENS_IN_TWO_BYTES = 65_500
"""As in Megatron-core, which stores smaller vocabularies as uint16."""


@dataclass(frozen=True)
class Index:
    """The content of an .idx file; the arrays are memory-mapped."""

    dtype: np.dtype
    """Type of the tokens in the .bin file."""
    lengths: NDArray[np.int32]
    """[sequences] tokens of each sequence."""
    pointers: NDArray[np.int64]
    """[sequences] where each sequence begins in the .bin file, in bytes."""
    documents: NDArray[np.int64]
    """[documents + 1] the first sequence of each document, and the number of sequences."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def ends(self) -> NDArray[np.int64]:
        """[documents + 1] where each document begins in the stream, in tokens, and the number of tokens."""
        return offsets_of(self.lengths.astype(np.int64))[self.documents]


def read_index(path: Path) -> Index:
    """
    Args:
        path: an .idx file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, of another format, or of a multimodal dataset; says what is wrong.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    if len(content) < _HEADER.size:
        raise ValueError(f"{len(content):,} bytes, which is less than the header of an index")
    mark, version, code, sequences, entries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if mark != _MARK:
        raise ValueError("it does not begin as an index of Megatron-core does")
    if version != _VERSION or code not in _TYPES:
        raise ValueError(f"version {version} with tokens of type {code}, which Megatron-core does not define")
    if _TYPES[code].startswith("float"):
        raise ValueError(f"it describes {_TYPES[code]} numbers, which are no token ids")
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if len(content) == expected + sequences > expected:
        raise ValueError("it belongs to a multimodal dataset, whose sequences have modes; kmem trains on text alone")
    if len(content) != expected:
        raise ValueError(f"{len(content):,} bytes, but {expected:,} follow from its header")

    def array(dtype: type, count: int, before: int) -> NDArray:
        return np.frombuffer(content, dtype, count, _HEADER.size + before)

    index = Index(
        np.dtype(_TYPES[code]),
        array(np.int32, sequences, 0),
        array(np.int64, sequences, 4 * sequences),
        array(np.int64, entries, 12 * sequences),
    )
    if sequences and index.lengths.min() < 0:
        raise ValueError("a sequence has a negative length")
    if (
        not entries
        or index.documents[0] != 0
        or index.documents[-1] != sequences
        or (np.diff(index.documents) < 0).any()
    ):
        raise ValueError("its documents do not cover its sequences one after another")
    return index


class IndexedTokens:
    """The tokens of a split, memory-mapped: one stream, and the place of each document in it."""

    def __init__(self, *prefixes: Path):
        """prefixes: paths without `.bin`/`.idx`; several datasets are joined.

        Raises:
            UserError: a file is missing or not an indexed dataset.
        """
        self._parts: list[NDArray[np.integer]] = []
        starts, lengths = [], []
        before = [0]
        for prefix in prefixes:
            try:
                index = read_index(dataset_file(prefix, "idx"))
                self._parts.append(map_tokens(dataset_file(prefix, "bin"), index))
            except (ValueError, OSError) as error:
                raise UserError(
                    f"{prefix}.bin, {prefix}.idx: not a Megatron indexed dataset ({error}); prepare the folder anew"
                ) from None
            ends = index.ends
            starts.append(before[-1] + ends[:-1])
            lengths.append(np.diff(ends))
            before.append(before[-1] + int(ends[-1]))
        self._before = np.array(before)
        there = np.concatenate(lengths) > 0  # Megatron-core allows documents without tokens; kmem leaves them out
        self.starts: NDArray[np.int64] = np.concatenate(starts)[there]
        """[documents] where each document begins in the stream, in tokens."""
        self.lengths: NDArray[np.int64] = np.concatenate(lengths)[there]
        """[documents] tokens of each document, with its EOS."""

    @classmethod
    def of_split(cls, folder: Path, manifest: Manifest, split: str) -> Self:
        """A split of a folder of data.

        Raises:
            UserError: a file is missing or damaged.
        """
        indexed = cls(*(folder / part for part in manifest.parts(split)))
        if HELD_OUT_NAME in manifest.files:
            held_out = read_held_out(folder / HELD_OUT_NAME, len(indexed.lengths))
            chosen = held_out if split == "validation" else ~held_out
            indexed.starts, indexed.lengths = indexed.starts[chosen], indexed.lengths[chosen]
        return indexed

    def take(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """A copy of the token ids at these places of the stream."""
        if len(self._parts) == 1:
            return self._parts[0][places].astype(np.int64)
        part_p = np.searchsorted(self._before, places, side="right") - 1
        tokens = np.empty(len(places), np.int64)
        for part in np.unique(part_p):
            here = part_p == part
            tokens[here] = self._parts[part][places[here] - self._before[part]]
        return tokens


class IndexedWriter:
    """Writes an indexed dataset as Megatron-core's builder does, to the byte: each document is one sequence.

    Args:
        prefix: path without `.bin`/`.idx`.
        dtype: type of the tokens, such as `uint16`.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        self._stream = open(dataset_file(prefix, "bin"), "wb")  # noqa: SIM115 - closed by `close`
        self._lengths: list[int] = []

    def add(self, ids: NDArray[np.integer]) -> None:
        """Append a document."""
        self._stream.write(ids.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(len(ids))

    def close(self) -> None:
        """Write the index; the dataset is complete."""
        self._stream.close()
        code = next(code for code, name in _TYPES.items() if name == self._dtype.name)
        documents = np.arange(len(self._lengths) + 1)
        with open(dataset_file(self._prefix, "idx"), "wb") as file:
            file.write(_HEADER.pack(_MARK, _VERSION, code, len(self._lengths), len(documents)))
            file.write(np.array(self._lengths, np.int32).tobytes())
            file.write((offsets_of(np.array(self._lengths, np.int64))[:-1] * self._dtype.itemsize).tobytes())
            file.write(documents.tobytes())


def token_dtype(tokens: int) -> str:
    """The type in which Megatron-core stores the ids of a vocabulary."""
    return "uint16" if tokens < _MOST_TOKENS_IN_TWO_BYTES else "int32"


def read_held_out(path: Path, documents: int) -> NDArray[np.bool_]:
    """[documents] whether a document is held out.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        held_out = np.load(path, allow_pickle=False)
        fits = held_out.dtype == np.bool_ and held_out.shape == (documents,)
    except (OSError, ValueError, EOFError):
        fits = False
    if not fits:
        raise UserError(f"{path}: missing or damaged: not a choice among {documents:,} documents; adopt the data anew")
    return held_out


def map_tokens(path: Path, index: Index) -> NDArray[np.integer]:
    """The tokens of a .bin file, memory-mapped: [tokens].

    Raises:
        OSError: it cannot be read.
        ValueError: its size is not the one that its index gives it.
    """
    size, expected = path.stat().st_size, index.tokens * index.dtype.itemsize
    if size != expected:
        raise ValueError(f"{size:,} bytes, but its index describes {expected:,}")
    return np.memmap(path, index.dtype, "r").view(np.ndarray) if size else np.empty(0, index.dtype)


def dataset_file(prefix: Path, ending: str) -> Path:
    """A file of an indexed dataset. ending: `bin` or `idx`."""
    return prefix.with_name(f"{prefix.name}.{ending}")
