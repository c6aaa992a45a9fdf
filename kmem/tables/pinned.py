"""Host memory that a device copies from and to by itself, allocated once and used again.

Pinning memory takes about as long as a copy through it, so a buffer per step would double the time of a fetch.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Buffer(Protocol):
    """Bytes of host memory."""

    bytes: Tensor
    """uint8 [size]."""

    def close(self) -> None: ...


class PinnedBuffer:
    """Pinned host memory of just this size. (torch's own allocator rounds up to powers of two and keeps what it gets
    back.)"""

    def __init__(self, size: int) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))
        self.bytes = torch.empty(0, dtype=torch.uint8)


class PinnedRing:
    """Buffers taken in turn, each again when the copy that last used it is through.

    A buffer that is too small is replaced by one for the largest size asked for so far, so that a run soon allocates
    nothing. With more than one, the next is filled while the last is copied.

    Args:
        buffers: their number.
        allocate: makes one.
    """

    def __init__(self, buffers: int, allocate: Callable[[int], Buffer] = PinnedBuffer) -> None:
        assert buffers >= 1
        self._allocate = allocate
        self._buffers: list[Buffer | None] = [None] * buffers
        self._copied: list[Any] = [None] * buffers
        self._largest = 0
        self._next = 0

    def take(self, size: int) -> Tensor:
        """uint8, at least `size` bytes, which no copy uses any more; waits for that. `copied` must follow."""
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
        """The buffer taken last is in use until this event has passed."""
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
