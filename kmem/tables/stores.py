"""Storage for the rows of a rank and their optimizer state: device memory, host memory, or a mapped file.

A store is one allocation per rank. It holds several arrays with the same number of rows: the rows themselves, moments,
step numbers. In memory, the arrays lie one after another. In a mapped file, everything that belongs to a row is one
record, so a cold row costs the page faults, reads and writes of one place, not of one place per array. (Host memory
keeps arrays: with records, lazy Adam was 6 to 9 % slower and gathers 13 to 30 % in tables of 0.3 to 0.5 GiB, since the
rows are then spread over three times as many pages.)
"""

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kmem.config import UserError
from kmem.files import FULL_DISK
from kmem.tables.read_ahead import read_ahead

StoreKind = Literal["device", "host", "mmap"]

CHUNK_BYTES = 1 << 24
"""Rows are filled and streamed in chunks of at most this many bytes (but at least one row)."""
_PAGE = 4096
"""Arrays start at a page boundary, so that direct reads and wide vectors stay possible."""
_HUGE_PAGE = 1 << 21
_TOUCHING_THREADS = 8
"""Threads that write the first zeros of a host store: one thread writes some 2 GB/s, a machine many times that."""


class StoreError(UserError):
    """A table needs memory or disk space that is not available; the message gives the numbers."""


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
    """The layout of a record, which holds one row of every array.

    Args:
        offsets: array -> offset of its row in the record, in bytes.
        size: number of used bytes in a record.
        stride: bytes from one record to the next.
    """

    offsets: dict[str, int]
    size: int
    stride: int

    @classmethod
    def of(cls, arrays: dict[str, ArrayLayout]) -> "RecordLayout":
        """Choose tight records, or records padded to a power-of-two part of a page (or to whole pages).

        Padding is chosen if it costs at most a third more bytes and lowers the product of bytes and pages per record. A
        record in fewer pages is read and written with fewer pages; a shorter record is more often in memory.
        """
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
        """Number of pages that a record touches, averaged over all records."""
        period = _PAGE // gcd(self.stride, _PAGE)
        starts = [number * self.stride % _PAGE for number in range(period)]
        return sum(1 + (start + self.size - 1) // _PAGE for start in starts) / period


class Store:
    """The arrays of one rank, each [rows, width]. They are views of one allocation, strided in a mapped store.

    Args:
        kind: "device" (memory of `device`), "host" or "mmap" (a file).
        rows: number of rows of this rank.
        arrays: name -> layout.
        device: device of the kind "device".
        path: file of the kind "mmap"; its folder must exist. The file is unlinked as soon as it is mapped, so no other
            process can open it, and its blocks are freed however this process ends.
        name: name of the table, for error messages.

    Raises:
        StoreError: the memory or the disk space is not available; nothing is left behind.
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
        self._mapping: mmap.mmap | None = None
        self.layout = RecordLayout.of(arrays) if kind == "mmap" else None
        """Layout of the records; None if the arrays lie one after another."""
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
            part = buffer[offsets[array] : offsets[array] + rows * layout.row_bytes]
            self.arrays[array] = part.view(layout.dtype).view(rows, layout.width)

    def __getitem__(self, array: str) -> Tensor:
        return self.arrays[array]

    @property
    def on_host(self) -> bool:
        """Whether numpy and compiled loops can work on the arrays in place."""
        return self.arrays == {} or next(iter(self.arrays.values())).device.type == "cpu"

    def columns(self, array: str) -> tuple[np.ndarray, np.uintp]:
        """A contiguous array [rows, columns] with the array's dtype (bf16 as uint16 bits), and the column at which the
        array's rows start in it. Compiled loops take them so: they are vectorised over parts of contiguous rows, but
        not over rows of a strided array."""
        values, start = self.arrays[array], 0
        if self._records is not None and self.layout is not None:
            start = self.layout.offsets[array] // values.element_size()
            values = self._records.view(values.dtype)
        return host_array(values), np.uintp(start)

    def fetch_ahead(self, rows: np.ndarray, writing: bool = True, part: tuple[str, slice] | None = None) -> None:
        """Read the records of rows [W] int64 into memory together, before they are used. Does nothing unless the store
        is mapped. Ascending rows cost least.

        Args:
            writing: also prepare the records for an update.
            part: an array and the slice of its columns that will be used; default: the whole record.

        Raises:
            StoreError: the file cannot be read, or has become shorter.
        """
        if self._records is None or self.layout is None or not len(rows):
            return
        start, size = 0, self.layout.size
        if part is not None:
            values = self.arrays[part[0]]
            first, stop, _ = part[1].indices(values.shape[1])
            start = self.layout.offsets[part[0]] + first * values.element_size()
            size = (stop - first) * values.element_size()
        error = read_ahead(self._records.data_ptr(), rows, self.layout.stride, start, size, writing)
        if error is not None:
            raise StoreError(f"table {self.name}: {self.path} cannot be read ({error})")

    def fill(self, array: str, values: Callable[[int, int], Tensor | np.ndarray]) -> None:
        """Write an array chunk by chunk; values(start, stop) returns rows [start, stop) as fp32 on the host."""
        target = self.arrays[array]
        for start, stop in self.chunks(array):
            self.fetch_ahead(np.arange(start, stop))
            target[start:stop].copy_(torch.as_tensor(values(start, stop)))

    def chunks(self, array: str) -> Iterator[tuple[int, int]]:
        """Row ranges [start, stop) of at most CHUNK_BYTES."""
        yield from chunk_ranges(self.rows, self.arrays[array].shape[1] * self.arrays[array].element_size())

    def pin(self, array: str) -> None:
        """Let the GPU read an array in host memory, until `close`."""
        values = self.arrays[array]
        size = _up(values.numel() * values.element_size(), _PAGE)  # arrays have pages of their own
        if size:
            # Registered in place: torch's allocator of pinned memory rounds sizes up to powers of two.
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(values.data_ptr(), size, 0))
            self._registered = values

    def close(self) -> None:
        """Free the arrays. A mapped file is freed with them: only checkpoints are permanent."""
        self.arrays, self._records = {}, None
        if self._registered is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._registered.data_ptr()))
            self._registered = None
        self._mapping = None

    def flush(self) -> None:
        """Wait until everything written to a mapped file is on the disk."""
        if self._mapping is not None:
            self._mapping.flush()

    def _allocate(self, device: torch.device) -> Tensor:
        size = max(self.bytes, 1)
        if self.kind == "mmap":
            assert self.path is not None, "a mapped store needs a file"
            self._mapping = map_new_file(self.path, size, self.name)
            return torch.frombuffer(self._mapping, dtype=torch.uint8)
        try:
            if self.kind == "device":
                return torch.zeros(size, dtype=torch.uint8, device=device)
            available = available_host_memory()
            if size > available:  # the system would kill the process during training
                raise StoreError(
                    f"table {self.name}: this rank's rows and their optimizer state need {gib(size)} of host memory, "
                    f"but {gib(int(available))} are available; use more ranks, fewer rows or the mmap store"
                )
            return _zeros_in_huge_pages(size)
        except (RuntimeError, MemoryError) as error:
            raise StoreError(
                f"table {self.name}: {gib(size)} of {self.kind} memory for this rank's rows and their optimizer state "
                f"cannot be allocated ({str(error).splitlines()[0]}); use more ranks, fewer rows or another store"
            ) from error


def chunk_ranges(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) that cover [0, rows), of at most CHUNK_BYTES but at least one row each."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def map_new_file(path: Path, size: int, name: str) -> mmap.mmap:
    """Make a file of zeros in the folder of `path`, map it for writing, and unlink it. Its blocks are reserved at once,
    since writing to a full disk through a mapping would kill the process.

    Raises:
        StoreError: the disk lacks the space, or the folder cannot be written.
    """
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise StoreError(_no_space(path, size, free, name))
        descriptor, made = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
        try:
            os.posix_fallocate(descriptor, 0, size)
            mapping = mmap.mmap(descriptor, size)
        finally:
            os.unlink(made)
            os.close(descriptor)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise StoreError(_no_space(path, size, shutil.disk_usage(path.parent).free, name)) from error
        raise StoreError(f"table {name}: {path} cannot be created ({error.strerror})") from error
    mapping.madvise(mmap.MADV_RANDOM)  # access is random: read-ahead would fill memory with neighbouring rows
    return mapping


def available_host_memory() -> float:
    """Bytes that this process can still allocate without swapping: the smaller of the limits of the machine and of its
    container (cgroup v2); infinite if the system does not tell."""
    available = float("inf")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Cached file pages count as used, but the system frees them first.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
    return available


def _zeros_in_huge_pages(size: int) -> Tensor:
    """uint8 [size] of zeros, whose memory is taken at once. Access to rows is random, so with pages of 4 KiB every row
    would also miss in the TLB: huge pages are asked for before anything is written, since later would be too late.
    Systems without them ignore the request. Threads of this process touch the pages first, so the memory is near the
    processors that the process may run on."""
    mapping = mmap.mmap(-1, _up(size, _HUGE_PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    parts = buffer.split(max(_HUGE_PAGE, _up(-(-len(buffer) // _TOUCHING_THREADS), _HUGE_PAGE)))
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: part.numpy().fill(0), parts))  # numpy lets other threads run meanwhile
    return buffer[:size]


def _no_space(path: Path, size: int, free: int, name: str) -> str:
    return (
        f"table {name}: {path} needs {gib(size)} of disk, but {gib(free)} are free; "
        "choose another folder, more nodes or fewer rows"
    )


def _up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def host_array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array; bf16 as uint16 bits."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def gib(size: int) -> str:
    """A size in bytes as readable text."""
    return f"{size / 2**30:.2f} GiB ({size} bytes)"
