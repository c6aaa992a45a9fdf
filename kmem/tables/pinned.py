"""Pinned host memory, which a device can copy from and to by DMA. Buffers are allocated once and reused.

Pinning memory takes about as long as a copy through it, so a new buffer per step would double the time of a fetch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PinnedBuffer:
    """Pinned host memory of exactly this size. (torch's own allocator rounds sizes up to powers of two and does not
    give freed memory back.)"""

    def __init__(self, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        """uint8 [size]."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))

    def close(self) -> None:
        """Unpin the memory; no copy may be in progress."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))
        self.bytes = torch.empty(0, dtype=torch.uint8)


class PinnedRing:
    """Buffers used in turn. A buffer is reused when the last copy from it has finished.

    A buffer that is too small is replaced by one with room for the largest size requested so far, so that a run soon
    stops allocating. With more than one buffer, the next one is filled while the last one is copied.

    Args:
        buffers: number of buffers.
        allocate: makes a buffer of the given size in bytes.
    """

    def __init__(self, buffers: int, allocate: Callable[[int], PinnedBuffer] = PinnedBuffer) -> None:
        assert buffers >= 1
        self._allocate = allocate
        self._buffers: list[PinnedBuffer | None] = [None] * buffers
        self._copied: list[Any] = [None] * buffers
        self._largest = 0
        self._next = 0

    def take(self, size: int) -> Tensor:
        """The next buffer, uint8 with at least `size` elements. Waits until no copy uses it. Call `copied` next."""
        place, self._largest = self._next, max(self._largest, size)
        if self._copied[place] is not None:
            self._copied[place].synchronize()
            self._copied[place] = None
        buffer = self._buffers[place]
        if buffer is None or len(buffer.bytes) < size:
            if buffer is not None:
                self._buffers[place] = None
                buffer.close()
            buffer = self._buffers[place] = self._allocate(self._largest + self._largest // 8 + 1)
        return buffer.bytes

    def copied(self, event: Any) -> None:
        """Mark the buffer taken last as in use until this event has passed."""
        self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)

    def close(self) -> None:
        """Wait for the last copies and free everything."""
        for place, buffer in enumerate(self._buffers):
            if self._copied[place] is not None:
                self._copied[place].synchronize()
            if buffer is not None:
                buffer.close()
            self._buffers[place] = self._copied[place] = None
