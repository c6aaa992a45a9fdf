"""Reads the pages of a mapped file together, before they are touched.

If the pages of cold rows are touched one after another, each page fault reads one page, and the first write to the page
faults again. If they are requested together, the system reads them in parallel. Measured with 14,000 rows of 256 bytes
and their Adam moments, all cold, on a disk that reads 40,000 pages a second one at a time; CPU and wall time per row of
fetch and update:

    three arrays, touched                       20.9 us      67 us
    records, touched                            10 - 17      35 - 38
    records, WILLNEED                            5.5 - 6.2   11 - 15
    records, WILLNEED and POPULATE_WRITE         3.9 - 4.4   11          (chosen)
    records, WILLNEED, then touched by a loop    6.0         23

If every row is in memory already, it takes 2.5 us without and 2.1 us with the chosen calls. One `process_madvise` for a
thousand ranges costs as much CPU time as one `madvise` per range, and older kernels refuse it for POPULATE_WRITE.
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
    """Read the pages that hold a part of each record. With `writing`, also map them writable, so that neither reads nor
    writes fault.

    If the system does not support a call, faults do the same work later.

    Args:
        base: address of record 0, aligned to a page.
        rows: [W] int64, numbers of records; records that are neighbours in this order are requested together.
        stride: bytes from one record to the next.
        offset: start of the part within a record, in bytes.
        size: size of the part, in bytes.

    Returns:
        Why pages cannot be read, so that touching them would kill the process; None if they can be read.
    """
    _advise(base, rows, stride, offset, size, mmap.PAGESIZE, _WILLNEED)
    if not writing:
        return None
    failed = _advise(base, rows, stride, offset, size, mmap.PAGESIZE, _POPULATE_WRITE)
    if failed < 0:
        return None
    # The compiled loop cannot read errno. From the failed record on, ctypes repeats the calls, which can.
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
    """One `madvise` per run of neighbouring pages; returns the place in `rows` of the first run that fails, or -1."""
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
