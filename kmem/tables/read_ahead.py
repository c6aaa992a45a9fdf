"""Pages of a mapped file, asked for together before they are touched.

Touched one after another, the pages of cold rows are read one at a time, each by a fault of its own, and fault once
more when they are written. Asked for together they are read side by side. Measured with 14,000 rows of 256 bytes and
their Adam moments, all cold, on a disk that reads 40,000 pages a second one at a time; CPU and wall time per row of
fetch and update:

    three arrays, touched                       20.9 us      67 us
    records, touched                            10 - 17      35 - 38
    records, WILLNEED                            5.5 - 6.2   11 - 15
    records, WILLNEED and POPULATE_WRITE         3.9 - 4.4   11          (chosen)
    records, WILLNEED, then touched by a loop    6.0         23

and 2.5 us without, 2.1 us with the chosen calls when every row is in memory already. One `process_madvise` for a
thousand ranges costs as much CPU time as `madvise` for each, and older kernels refuse it for POPULATE_WRITE.
"""

import ctypes
import errno
import mmap
import os
from typing import Any

import numba
import numpy as np
from numba.core import types

_WILLNEED, _POPULATE_WRITE = mmap.MADV_WILLNEED, 23  # the latter since Linux 5.14; not in Python's module before 3.14
_UNREADABLE = (errno.EFAULT, errno.EIO)
_madvise: Any = types.ExternalFunction("madvise", types.intc(types.uintp, types.uintp, types.intc))


def read_ahead(base: int, rows: np.ndarray, stride: int, offset: int, size: int, writing: bool) -> str | None:
    """Read the pages of a part of records; with `writing` also map them writable: neither reads nor writes fault then.

    What the system does not support is left to faults, which do the same later.

    Args:
        base: address of record 0, at a page.
        rows: [W] int64 numbers of records; neighbours in this order are asked for together.
        stride: bytes from one record to the next.
        offset: where the part starts in a record, in bytes.
        size: bytes of the part.

    Returns:
        Why pages cannot be read, None if they can: touching them would kill the process.
    """
    _advise(base, rows, stride, offset, size, mmap.PAGESIZE, _WILLNEED)
    if not writing:
        return None
    failed = _advise(base, rows, stride, offset, size, mmap.PAGESIZE, _POPULATE_WRITE)
    if failed < 0:
        return None
    # The loop cannot see errno: from there on records are asked for where it can be seen.
    system = ctypes.CDLL(None, use_errno=True)
    for row in rows[failed:].tolist():
        start = (row * stride + offset) // mmap.PAGESIZE * mmap.PAGESIZE
        length = row * stride + offset + size - start
        if system.madvise(ctypes.c_void_p(base + start), ctypes.c_size_t(length), _POPULATE_WRITE):
            number = ctypes.get_errno()
            return os.strerror(number) if number in _UNREADABLE else None
    return None


@numba.njit(nogil=True, cache=True)
def _advise(base, rows, stride, offset, size, page, advice):
    """One call per run of neighbouring pages; the place in `rows` of the first run that was refused, or -1."""
    count, i = rows.shape[0], 0
    while i < count:
        row = i
        start = rows[i] * stride + offset
        first, last = start // page, (start + size - 1) // page
        i += 1
        while i < count and first <= (rows[i] * stride + offset) // page <= last + 1:
            last = max(last, (rows[i] * stride + offset + size - 1) // page)
            i += 1
        if _madvise(np.uint64(base + first * page), np.uint64((last - first + 1) * page), np.int32(advice)) != 0:
            return row
    return -1
