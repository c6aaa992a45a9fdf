"""Where the rows of a rank and their optimizer state live: device memory, host memory, or a mapped file.

A store is one allocation per rank that holds several arrays of equally many rows: the rows themselves, moments, step
numbers. In memory the arrays lie one behind the other. In a mapped file everything that belongs to a row lies together,
one record per row: the page faults, reads and writes of a cold row are then those of one place, not of every array.
(Host memory keeps arrays: with records lazy Adam was 6 to 9 % slower and gathers 13 to 30 % in tables of 0.3 to 0.5
GiB, since rows alone are then spread over three times as many pages.)
"""

import errno
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kmem.config import UserError
from kmem.memory.read_ahead import read_ahead

StoreKind = Literal["device", "host", "mmap"]

CHUNK_BYTES = 1 << 24
"""Rows are filled and streamed in pieces of at most this size (at least one row)."""
_PAGE = 4096
"""Arrays start at a page, so that huge pages, direct reads and wide vectors stay possible."""


class StoreError(UserError):
    """Memory or disk space for a table that cannot be had; the message gives the numbers."""


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store: a value or a vector of `width` values per row."""

    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclass(frozen=True)
class RecordLayout:
    """Where the arrays' parts of a row lie in its record.

    Args:
        offsets: array -> its first byte.
        size: bytes of a record that are used.
        stride: from one record to the next.
    """

    offsets: dict[str, int]
    size: int
    stride: int

    @classmethod
    def of(cls, arrays: dict[str, ArrayLayout]) -> "RecordLayout":
        """Records side by side, or padded to a whole part of a page (or to whole pages) where that costs at most a
        third more and lowers bytes times pages per record: a record that lies in fewer pages is read and written with
        fewer, one that is shorter is more often in memory."""
        offsets, size, alignment = {}, 0, 1
        for array, layout in arrays.items():
            width = layout.dtype.itemsize
            offsets[array] = _up(size, width)
            size, alignment = offsets[array] + layout.row_bytes, max(alignment, width)
        tight = cls(offsets, size, _up(size, alignment))
        parts = max(1, _PAGE // tight.stride)
        whole = cls(offsets, size, _PAGE >> (parts.bit_length() - 1) if size <= _PAGE else _up(size, _PAGE))
        if 3 * whole.stride > 4 * tight.stride:
            return tight
        return min(tight, whole, key=lambda layout: layout.stride * layout.mean_pages)

    @property
    def mean_pages(self) -> float:
        """Pages in which a record lies, on average over all."""
        period = _PAGE // gcd(self.stride, _PAGE)
        starts = [number * self.stride % _PAGE for number in range(period)]
        return sum(1 + (start + self.size - 1) // _PAGE for start in starts) / period


class Store:
    """The arrays of one rank, each [rows, width], views of one allocation; those of a mapped store are strided.

    Args:
        kind: "device" (memory of `device`), "host" (pinned when CUDA is present) or "mmap" (a file).
        rows: rows of this rank.
        arrays: name -> layout.
        device: used by "device".
        path: the file of "mmap", created anew; its folder must exist.
        name: the table, for error messages.

    Raises:
        StoreError: the memory or the disk space is not there; nothing is left behind.
    """

    def __init__(
        self,
        kind: StoreKind,
        rows: int,
        arrays: dict[str, ArrayLayout],
        device: torch.device | str = "cpu",
        path: Path | None = None,
        name: str = "table",
    ) -> None:
        self.kind, self.rows, self.path, self.name = kind, rows, path, name
        self._registered: Tensor | None = None
        self._records: Tensor | None = None
        self.layout = RecordLayout.of(arrays) if kind == "mmap" else None
        """Of records; None where arrays lie one behind the other."""
        self.arrays: dict[str, Tensor] = {}
        if self.layout is not None:
            self.bytes = _up(rows * self.layout.stride, _PAGE)
            buffer = self._allocate(torch.device(device))
            self._records = buffer[: rows * self.layout.stride].view(rows, self.layout.stride)
            for array, layout in arrays.items():
                start = self.layout.offsets[array]
                self.arrays[array] = self._records[:, start : start + layout.row_bytes].view(layout.dtype)
            return
        offsets, self.bytes = {}, 0
        for array, layout in arrays.items():
            offsets[array] = self.bytes
            self.bytes += _up(rows * layout.row_bytes, _PAGE)
        buffer = self._allocate(torch.device(device))
        for array, layout in arrays.items():
            self.arrays[array] = _view(buffer, offsets[array], (rows, layout.width), layout.dtype)

    def __getitem__(self, array: str) -> Tensor:
        return self.arrays[array]

    @property
    def on_host(self) -> bool:
        """True when numpy and compiled loops can work on the arrays in place."""
        return self.arrays == {} or next(iter(self.arrays.values())).device.type == "cpu"

    def columns(self, array: str) -> tuple[Tensor, int]:
        """A contiguous tensor [rows, columns] of the array's type and the column at which the array's rows start in
        it. Compiled loops are vectorised over parts of contiguous rows, not over a strided array's."""
        if self._records is None or self.layout is None:
            return self.arrays[array], 0
        dtype = self.arrays[array].dtype
        return self._records.view(dtype), self.layout.offsets[array] // dtype.itemsize

    def fetch_ahead(self, rows: np.ndarray, writing: bool = True) -> None:
        """Bring the records of rows [W] int64 into memory together, before they are used; those in ascending order at
        the least cost. Only a mapped store has anything to do. `writing` prepares their update, too.

        Raises:
            StoreError: the file cannot be read, or has become shorter.
        """
        if self._records is None or self.layout is None or not len(rows):
            return
        error = read_ahead(self._records.data_ptr(), rows, self.layout.stride, self.layout.size, writing)
        if error is not None:
            raise StoreError(f"table {self.name}: {self.path} cannot be read ({error})")

    def fill(self, array: str, values: Callable[[int, int], Tensor]) -> None:
        """Write an array chunk by chunk: values(start, stop) gives those rows as fp32 on the host."""
        target = self.arrays[array]
        for start, stop in self.chunks(array):
            self.fetch_ahead(np.arange(start, stop))
            target[start:stop].copy_(values(start, stop))

    def chunks(self, array: str) -> Iterator[tuple[int, int]]:
        """Row ranges of at most CHUNK_BYTES."""
        yield from chunk_ranges(self.rows, self.arrays[array].shape[1] * self.arrays[array].element_size())

    def close(self) -> None:
        """Drop the arrays; a mapped file is deleted, since a checkpoint, not the file, is what is kept."""
        self.arrays, self._records = {}, None
        if self._registered is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._registered.data_ptr()))
            self._registered = None
        if self.kind == "mmap" and self.path is not None:
            self.path.unlink(missing_ok=True)

    def _allocate(self, device: torch.device) -> Tensor:
        size = max(self.bytes, 1)
        if self.kind == "mmap":
            assert self.path is not None, "a mapped store needs a file"
            create_file(self.path, size, self.name)
            return map_file(self.path, size, self.name)
        try:
            if self.kind == "device":
                return torch.zeros(size, dtype=torch.uint8, device=device)
            _check_host_memory(size, self.name)
            buffer = torch.zeros(size, dtype=torch.uint8)
            if torch.cuda.is_available():
                # Registered in place: torch's allocator of pinned memory rounds sizes up to powers of two.
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
                self._registered = buffer
            return buffer
        except (RuntimeError, MemoryError) as error:
            raise StoreError(
                f"table {self.name}: {_gib(size)} of {self.kind} memory for this rank's rows and their optimizer state "
                f"cannot be allocated ({str(error).splitlines()[0]}); use more ranks, fewer rows or another store"
            ) from error


def chunk_ranges(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """[0, rows) in pieces of at most CHUNK_BYTES, at least one row each."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def create_file(path: Path, size: int, name: str) -> None:
    """A file of zeros whose blocks are reserved: writing through a mapping to a full disk would kill the process.

    Raises:
        StoreError: the disk lacks the space, or the folder cannot be written.
    """
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise StoreError(_no_space(path, size, free, name))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(_no_space(path, size, shutil.disk_usage(path.parent).free, name)) from error
        raise StoreError(f"table {name}: {path} cannot be created ({error.strerror})") from error


def map_file(path: Path, size: int, name: str) -> Tensor:
    """The bytes of a file as a writable uint8 tensor, shared with the file.

    Raises:
        StoreError: the file is missing, or shorter than the table.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise StoreError(f"table {name}: {path} cannot be opened ({error.strerror})") from error
    if found < size:
        raise StoreError(
            f"table {name}: {path} has {found} bytes and its rows need {size}; delete the file, it is written anew"
        )
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), size)
    mapping.madvise(mmap.MADV_RANDOM)  # rows are read at random: reading ahead would fill memory with neighbours
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _check_host_memory(size: int, name: str) -> None:
    """Refuse what the machine cannot hold before the system kills the process in the middle of training."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return
    available = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    if size > available:
        raise StoreError(
            f"table {name}: this rank's rows and their optimizer state need {_gib(size)} of host memory and "
            f"{_gib(available)} are available; use more ranks, fewer rows or the mmap store"
        )


def _no_space(path: Path, size: int, free: int, name: str) -> str:
    return (
        f"table {name}: {path} needs {_gib(size)} of disk and {_gib(free)} are free; "
        "choose another folder, more nodes or fewer rows"
    )


def _up(size: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-size // unit) * unit


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB ({size} bytes)"


def _view(buffer: Tensor, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
