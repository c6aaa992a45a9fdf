"""Between the worker's host arrays and the compute device, on a stream of the worker's own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from kmem.tables.exchange import as_tensor
from kmem.tables.pinned import PinnedBuffer, PinnedRing
from kmem.tables.working_set import StepPlan, WorkingSet

_ALIGNMENT = 256
"""Arrays in a pinned buffer begin where any type and any wide copy may."""


class DeviceCopy:
    """Copies and kernels for one worker thread. On a CPU nothing is copied.

    All of it runs on one stream, in the order in which the worker asked for it.

    Args:
        device: where working sets are used.
        depth: steps that may be begun beyond the one being computed.
    """

    def __init__(self, device: torch.device, depth: int = 1) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One buffer for the step that is filled, one for every step whose copies may still be queued.
        self._ring = PinnedRing(depth + 2)
        self._download: PinnedBuffer | None = None

    # Worker thread.

    def run(self, work: Callable[[], object]) -> None:
        """Give work to the stream: after all that it has, not waited for."""
        with self._streamed():
            work()

    def upload(self, *arrays: np.ndarray) -> list[Tensor]:
        """Copies of host arrays on the device (bf16 for uint16), later on the stream; the arrays may change at once.
        On a CPU the arrays themselves."""
        if self._stream is None:
            return [as_tensor(array) for array in arrays]
        ends = np.cumsum([-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays])
        copies = []
        with self._streamed():  # memory is pinned with this device current: the worker's thread has another by default
            buffer = self._ring.take(int(ends[-1]))
            for array, end in zip(arrays, ends.tolist(), strict=True):
                start = end - -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
                pinned = as_tensor(buffer[start : start + array.nbytes].numpy().view(array.dtype).reshape(array.shape))
                pinned.copy_(as_tensor(array))
                copies.append(pinned.to(self.device, non_blocking=True))
            self._ring.copied(self._event())
        return copies

    def empty(self, rows: int, dim: int) -> Tensor:
        """fp32 [rows, dim] on the device, for work on the stream to fill."""
        with self._streamed():
            return torch.empty(rows, dim, device=self.device)

    def zeros(self, rows: int, dim: int) -> Tensor:
        """fp32 [rows, dim], made on the stream."""
        with self._streamed():
            return torch.zeros(rows, dim, device=self.device)

    def working_set(self, rows: np.ndarray | Tensor, plan: StepPlan, trainable: bool) -> tuple[WorkingSet, object]:
        """Rows of the host (fp32, or bf16 bits) or of the stream, as fp32 on the device, and an event after which they
        are there."""
        places = [some.numpy() for some in plan.index]
        if isinstance(rows, Tensor):
            index = self.upload(*places)
        else:
            rows, *index = self.upload(rows, *places)
        with self._streamed():
            working_set = WorkingSet(rows.float(), index, trainable)
        return working_set, None if self._stream is None else self._event()

    def follow(self, event: object) -> None:
        """Let the stream wait for an event of the main thread's."""
        if self._stream is not None and event is not None:
            assert isinstance(event, torch.cuda.Event)
            self._stream.wait_event(event)

    def take_over(self, values: Tensor, computed: object) -> Tensor:
        """A tensor of the main thread's for use on the stream, where it is ready when `computed` has passed."""
        self.follow(computed)
        if self._stream is not None:
            values.record_stream(self._stream)  # the main thread may drop it before the stream is through with it
        return values

    def to_host(self, values: Tensor, computed: object) -> np.ndarray:
        """A tensor's values once `computed` has passed; valid until the next call."""
        if self._stream is None:
            return values.numpy()
        self.follow(computed)
        with self._streamed():
            if self._download is None or len(self._download.bytes) < values.nbytes:
                if self._download is not None:
                    self._download.close()
                    self._download = None
                self._download = PinnedBuffer(values.nbytes + values.nbytes // 8 + 1)
            pinned = self._download.bytes[: values.nbytes].view(values.dtype).view(values.shape)
            pinned.copy_(values, non_blocking=True)
        self.settle()
        return pinned.numpy()

    def settle(self) -> None:
        """Wait until all that the stream was given is done."""
        if self._stream is not None:
            self._stream.synchronize()

    # Main thread.

    def mark(self) -> object:
        """An event behind what the current stream has been given so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hand_over(self, working_set: WorkingSet, arrived: object) -> WorkingSet:
        """Let the current stream wait for a working set."""
        if arrived is not None:
            assert isinstance(arrived, torch.cuda.Event)
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(arrived)
            # Allocated on the worker's stream: the memory may not be reused before this stream is through with it.
            working_set.rows.record_stream(stream)
            for index in working_set.index:
                index.record_stream(stream)
        return working_set

    def close(self) -> None:
        """Finish what the stream has and free the pinned buffers."""
        self.settle()
        self._ring.close()
        if self._download is not None:
            self._download.close()
            self._download = None

    def _streamed(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
