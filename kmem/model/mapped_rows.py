"""Rows of a table that stays in safetensors files: mapped, read-only, and read on demand."""

import json
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Shape letters: R rows of a table (R_i of part i), D values of a row, n requested rows.

# safetensors' name -> (numpy dtype, torch dtype)
DTYPES: Mapping[str, tuple[str, torch.dtype]] = {
    "F32": ("<f4", torch.float32),
    "BF16": ("<i2", torch.bfloat16),  # numpy has no bfloat16: integers carry the bits
    "F16": ("<f2", torch.float16),
}
LONGEST_HEADER = 100 << 20  # the limit of the safetensors library
LONG_ROW = 64 << 10
"""Rows of at least this many bytes are read from the file in one piece. Through the mapping, every page is a separate
read, and requesting the pages beforehand helps only in part: two cold rows of 18 MiB took 0.3 to 0.5 s to fault, 0.1 to
0.6 s with MADV_WILLNEED, and 0.02 to 0.08 s to read."""


@dataclass(frozen=True)
class StoredEntry:
    """A tensor of a safetensors file."""

    dtype: str
    """Dtype as safetensors names it, such as F32."""
    shape: tuple[int, ...]
    start: int
    """First byte of the tensor in the file."""
    stop: int
    """First byte after the tensor."""


class SafetensorsFile:
    """The header of a safetensors file, and the file mapped read-only. Pickling stores the path; unpickling maps the
    file again and refuses a changed one.

    Raises:
        ValueError: the file is missing, not a safetensors file, or shorter than its header states; names the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                size = status.st_size
                self._identity = size, status.st_mtime_ns
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(size - 8, LONGEST_HEADER):
                    raise ValueError(f"{self.path}: not a safetensors file, or a truncated one")
                self.entries, end = _entries(file.read(length), 8 + length, self.path)
                if size < end:
                    raise ValueError(f"{self.path}: truncated: {size} bytes of {end}; fetch or export it again")
                self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be mapped: {error.strerror or error}") from error
        if hasattr(mmap, "MADV_RANDOM"):  # access is random: read-ahead would read pages that nobody needs
            self.mapped.madvise(mmap.MADV_RANDOM)

    def entry(self, name: str) -> StoredEntry:
        """The tensor of this name.

        Raises:
            ValueError: the file has no such tensor; names both.
        """
        if name not in self.entries:
            raise ValueError(f"{self.path}: has no tensor {name}")
        return self.entries[name]

    def drop_pages(self) -> None:
        """Drop the file's pages from the system's cache, so that they are read from the disk again. For measurements;
        works if the system supports both calls."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)  # the cache keeps pages that are still mapped
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def read_into(self, out: np.ndarray[Any, Any], start: int) -> None:
        """Fill a contiguous array with the bytes from `start` on, read without the mapping.

        Raises:
            ValueError: the file has become shorter; names it.
        """
        left = out.data.cast("B")
        while left:
            count = os.preadv(self._descriptor, [left], start)
            if not count:
                raise ValueError(f"{self.path}: truncated while it was in use; fetch or export it again")
            left, start = left[count:], start + count

    def __reduce__(self) -> tuple[Any, ...]:
        return SafetensorsFile.again, (os.path.abspath(self.path), self._identity)

    @classmethod
    def again(cls, path: str, identity: tuple[int, int]) -> "SafetensorsFile":
        """Map a file again that a copy of the model, or another process, had mapped.

        Args:
            identity: the file's size in bytes and time of last change in ns. Contents are not compared: that would mean
                reading all tables, which the mapping avoids.

        Raises:
            ValueError: the file is missing, or has changed; names it.
        """
        file = cls(path)
        if file._identity != identity:
            raise ValueError(f"{path}: changed since it was mapped; load the model from its folder again")
        return file


@dataclass(frozen=True)
class _Part:
    """Consecutive rows of a table."""

    rows: np.ndarray[Any, Any]
    """[R_i, D], mapped or a copy."""
    file: SafetensorsFile | None
    """The file of mapped rows; None: `rows` is a copy."""
    start: int = 0
    """First byte of the rows in the file."""

    @property
    def long(self) -> bool:
        """Whether rows are so long that they are read from the file, not through the mapping."""
        size = self.rows.shape[1] * self.rows.itemsize
        return self.file is not None and size >= LONG_ROW and hasattr(os, "preadv")

    def read(self, ids: np.ndarray[Any, Any], out: np.ndarray[Any, Any], places: np.ndarray[Any, Any]) -> None:
        """Write the rows `ids` [n], numbered within this part, to the rows `places` [n] of `out` [.., D]."""
        if self.file is None or not self.long:
            out[places] = self.rows[ids]
            return
        size = self.rows.shape[1] * self.rows.itemsize
        for place, number in zip(places.tolist(), ids.tolist(), strict=True):
            self.file.read_into(out[place], self.start + number * size)


@dataclass(frozen=True)
class Segment:
    """Consecutive values of a table, [R, D] in row-major order, that lie in one file."""

    file: SafetensorsFile
    entry: str
    """Name of the tensor that holds these values and nothing else; its shape does not matter."""


class MappedRows:
    """A table whose values lie in consecutive segments of mapped files.

    Calling it with row ids int64 [..] returns [.., D] on the device of the ids, in the dtype of the files. The system
    caches pages that were read as long as it has free memory; the process itself allocates only the result. Rows may
    have tens of megabytes. An id that occurs twice is read twice. Several threads may call it at once. Copies share the
    files, and unpickling maps them again by path.

    Args:
        name: name of the table, for errors.
        dim: values per row, D.
        segments: segments in the order of the table. A row may cross from one segment to the next.

    Raises:
        ValueError: a segment's tensor is missing, its dtype differs from the others' or is not one of DTYPES, or the
            segments do not hold a whole number of rows.
    """

    def __init__(self, name: str, dim: int, segments: Iterable[Segment]) -> None:
        self.name = name
        self.dim = dim
        self._segments = tuple(segments)
        spans: list[tuple[SafetensorsFile, int, int]] = []  # file, first byte, end
        stored: str | None = None
        for segment in self._segments:
            entry = segment.file.entry(segment.entry)
            if entry.dtype not in DTYPES:
                known = ", ".join(DTYPES)
                raise ValueError(f"{segment.file.path}: {segment.entry} is {entry.dtype}; rows must be one of {known}")
            if stored not in (None, entry.dtype):
                raise ValueError(
                    f"{segment.file.path}: {segment.entry} is {entry.dtype}, but {name} starts with {stored}"
                )
            stored = entry.dtype
            first = entry.start
            if spans and spans[-1][0] is segment.file and spans[-1][2] == first:
                first = spans.pop()[1]  # neighbours: a checkpoint stores long tensors in intervals
            spans.append((segment.file, first, entry.stop))
        if stored is None:
            raise ValueError(f"{name}: no file holds its rows")
        kind, self.dtype = DTYPES[stored]
        self._parts = list(_whole_rows(name, dim, spans, np.dtype(kind)))
        lengths = [len(part.rows) for part in self._parts]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self.rows = sum(lengths)

    @property
    def files(self) -> list[SafetensorsFile]:
        """The files that hold its rows."""
        return list({part.file.path: part.file for part in self._parts if part.file is not None}.values())

    @classmethod
    def open(cls, name: str, dim: int, parts: Iterable[tuple[str | os.PathLike[str], str, int]]) -> "MappedRows":
        """A table of row ranges, each given as (file, name of a tensor [R_i, D] in it, R_i).

        Raises:
            ValueError: as `MappedRows`, or a tensor has another shape; names the file and the tensor.
        """
        files: dict[str, SafetensorsFile] = {}
        segments = []
        for path, entry, rows in parts:
            key = os.fspath(path)
            if key not in files:
                files[key] = SafetensorsFile(key)
            shape = files[key].entry(entry).shape
            if shape != (rows, dim):
                raise ValueError(f"{key}: {entry} has shape {list(shape)}, expected {[rows, dim]}")
            segments.append(Segment(files[key], entry))
        return cls(name, dim, segments)

    def __len__(self) -> int:
        return self.rows

    def __call__(self, rows: Tensor) -> Tensor:
        ids = rows.detach().cpu().numpy().reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.rows:
            raise IndexError(f"{self.name} has {self.rows} rows; rows {ids.min()} to {ids.max()} were requested")
        part = self._parts[0]
        if len(self._parts) == 1 and not part.long:
            out = part.rows[ids]
        else:
            out = np.empty((len(ids), self.dim), part.rows.dtype)
            part_numbers = np.searchsorted(self._starts, ids, side="right") - 1
            for number in np.unique(part_numbers).tolist():
                places = np.nonzero(part_numbers == number)[0]
                self._parts[number].read(ids[places] - self._starts[number], out, places)
        values = torch.from_numpy(out)
        values = values.view(self.dtype) if values.dtype != self.dtype else values
        return values.view(*rows.shape, self.dim).to(rows.device)

    def __copy__(self) -> "MappedRows":
        return self  # read-only: copies of a model share it

    def __deepcopy__(self, memo: dict[int, Any]) -> "MappedRows":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self.name, self.dim, self._segments)


def _entries(header: bytes, data: int, path: Path) -> tuple[dict[str, StoredEntry], int]:
    """The tensors of a header, and the end of the last tensor; `data` is the first byte after the header."""
    try:
        tree = json.loads(header)
        entries, end = {}, data
        for name, entry in tree.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            entries[name] = StoredEntry(entry["dtype"], tuple(entry["shape"]), data + start, data + stop)
            end = max(end, data + stop)
            size = np.dtype(DTYPES[entry["dtype"]][0]).itemsize if entry["dtype"] in DTYPES else None
            if size is not None and int(np.prod(entry["shape"], dtype=np.int64)) * size != stop - start:
                raise ValueError(f"{name} has a length that does not match its shape")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its safetensors header cannot be read: {error}") from error
    return entries, end


def _whole_rows(
    name: str, dim: int, spans: Iterable[tuple[SafetensorsFile, int, int]], kind: np.dtype[Any]
) -> Iterable[_Part]:
    """Cut the values of the spans (file, first byte, end) into parts of whole rows; a row that crosses spans is
    copied."""
    begun = np.empty(0, kind)
    for file, start, stop in spans:
        values = np.frombuffer(file.mapped, kind, (stop - start) // kind.itemsize, start)
        if len(begun):
            missing = dim - len(begun)
            begun = np.concatenate((begun, values[:missing]))
            values, start = values[missing:], start + missing * kind.itemsize
            if len(begun) < dim:
                continue
            yield _Part(begun[None], None)
            begun = begun[:0]
        whole = len(values) // dim * dim
        if whole:
            yield _Part(values[:whole].reshape(-1, dim), file, start)
        begun = values[whole:]
    if len(begun):
        raise ValueError(f"{name}: its files end in the middle of a row; a row has {dim} values")
