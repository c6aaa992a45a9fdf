"""Copies between the worker's host arrays and the compute device, on the worker's own stream, through pinned
host memory, which a device can copy from and to by DMA."""

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmem.tables.exchange import as_tensor
from kmem.tables.working_set import StepPlan, WorkingSet

_ALIGNMENT = 256
"""Alignment of arrays in a pinned buffer, in bytes; enough for any dtype and any wide copy."""

Event = torch.cuda.Event | None
"""A point on a stream; None on a CPU, where nothing is queued."""


class DeviceCopy:
    """Copies and kernels for one worker thread. On a CPU nothing is copied.

    Everything runs on one stream, in the order in which the worker queued it.

    Args:
        device: where working sets are used.
        depth: number of steps that may be begun beyond the one being computed.
    """

    def __init__(self, device: torch.device, depth: int = 1) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One buffer for the step that is being filled, and one for every step whose copies may still be queued.
        self._ring = PinnedRing(depth + 2)
        self._download = PinnedRing(1)

    # Worker thread.

    def run(self, work: Callable[[], object]) -> None:
        """Queue work on the stream, behind everything queued before; does not wait for it."""
        with self._streamed():
            work()

    def upload(self, *arrays: np.ndarray) -> list[Tensor]:
        """Copies of host arrays on the device (bf16 for uint16). The copies are queued on the stream, but the arrays
        may change as soon as this returns. On a CPU, the arrays themselves."""
        if self._stream is None:
            return [as_tensor(array) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
        copies = []
        with self._streamed():  # pins with this device current: the worker thread's default may be another device
            buffer = self._ring.take(int(ends[-1]))
            for array, end in zip(arrays, ends.tolist(), strict=True):
                start = end - -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
                pinned = as_tensor(buffer[start : start + array.nbytes].numpy().view(array.dtype).reshape(array.shape))
                pinned.copy_(as_tensor(array))
                copies.append(pinned.to(self.device, non_blocking=True))
            self._ring.copied(self._stream.record_event())
        return copies

    def empty(self, rows: int, dim: int) -> Tensor:
        """fp32 [rows, dim] on the device, for work on the stream to fill."""
        with self._streamed():
            return torch.empty(rows, dim, device=self.device)

    def working_set(self, rows: np.ndarray | Tensor, plan: StepPlan, trainable: bool) -> tuple[WorkingSet, Event]:
        """A working set with the rows as fp32 on the device, and the event that marks their arrival.

        Args:
            rows: a host array (fp32, or the bits of bf16), or a device tensor that the stream fills.
        """
        places = [index.numpy() for index in plan.index]
        if isinstance(rows, Tensor):
            index = self.upload(*places)
        else:
            rows, *index = self.upload(rows, *places)
        with self._streamed():
            working_set = WorkingSet(rows.float(), index, trainable, plan.rows)
        return working_set, None if self._stream is None else self._stream.record_event()

    def follow(self, event: Event) -> None:
        """Let the stream wait for an event of the main thread."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def take_over(self, values: Tensor, computed: Event) -> Tensor:
        """Make a tensor of the main thread usable on the stream, which waits for the event `computed`."""
        self.follow(computed)
        if self._stream is not None:
            values.record_stream(self._stream)  # the main thread may drop it while the stream still uses it
        return values

    def to_host(self, values: Tensor, computed: Event) -> np.ndarray:
        """Wait for the event `computed` and copy a tensor to the host; the array is valid until the next call."""
        if self._stream is None:
            return values.numpy()
        self.follow(computed)
        with self._streamed():
            pinned = self._download.take(values.nbytes)[: values.nbytes].view(values.dtype).view(values.shape)
            pinned.copy_(values, non_blocking=True)
        self.settle()
        return pinned.numpy()

    def fetch(self, work: Callable[[], Tensor]) -> Tensor:
        """What the work computes, behind everything queued on the stream before, in host memory. The main thread's
        stream, on which the running step is queued, has no part in it."""
        with self._streamed():
            return work().cpu()

    def settle(self) -> None:
        """Wait until the stream has finished everything queued on it."""
        if self._stream is not None:
            self._stream.synchronize()

    # Main thread.

    def mark(self) -> Event:
        """An event behind everything queued on the current stream so far; None on a CPU."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def hand_over(self, working_set: WorkingSet, arrived: Event) -> WorkingSet:
        """Let the current stream wait for a working set; `arrived` is the event from `working_set`."""
        if arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            # Allocated on the worker's stream: the memory may not be reused while this stream still uses it.
            working_set.rows.record_stream(stream)
            for index in working_set.index:
                index.record_stream(stream)
        return working_set

    def close(self) -> None:
        """Wait for the stream and free the pinned buffers."""
        self.settle()
        self._ring.close()
        self._download.close()

    def _streamed(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class PinnedBuffer:
    """Pinned host memory of exactly this size, in pages of its own: a page can be pinned once. (torch's own allocator
    rounds sizes up to powers of two and does not give freed memory back.)"""

    def __init__(self, size: int) -> None:
        self.bytes = torch.frombuffer(
            mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
        )
        """uint8 [size]."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))

    def close(self) -> None:
        """Unpin the memory; no copy may be in progress."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))
        self.bytes = torch.empty(0, dtype=torch.uint8)


class PinnedRing:
    """Buffers used in turn. A buffer is reused when the last copy from it has finished. Pinning memory takes about as
    long as a copy through it, so a new buffer per step would double the time of a fetch.

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
