"""Moves rows from their owners into a step's working set, and gradients back: through the host, or in place."""

import logging

import numpy as np
import torch
from torch import Tensor

from kmem.tables.device_copy import DeviceCopy, Event
from kmem.tables.exchange import Exchange, Request
from kmem.tables.row_optimizers import kernels
from kmem.tables.row_threads import RowThreads
from kmem.tables.stores import Store, host_array

# Shape letters: U rows that this rank asks for, W rows that all ranks want from it, D values of a row.

log = logging.getLogger(__name__)


def make_row_transport(
    store: Store, exchange: Exchange, threads: RowThreads, copy: DeviceCopy
) -> "ThroughHost | InPlace":
    """The transport of a table; it never changes. Rows are gathered in place if they need not leave the rank and a
    device can read them: on CUDA, with one rank, from the stores `device` and `host`."""
    if copy.device.type == "cuda" and exchange.ranks == 1 and store.kind in ("device", "host"):
        log.info("table %s: the device gathers rows from %s memory in place", store.name, store.kind)
        return InPlace(store, copy)
    return ThroughHost(store, exchange, threads, copy)


class ThroughHost:
    """Owners gather rows into host memory, ranks exchange them there, and each rank copies its whole working set to its
    device in one piece. Works with any store and any number of ranks."""

    def __init__(self, store: Store, exchange: Exchange, threads: RowThreads, copy: DeviceCopy) -> None:
        self._store, self._exchange, self._threads, self._copy = store, exchange, threads, copy

    def empty(self, count: int) -> np.ndarray:
        """An uninitialised array [count, D] for rows in the table's own dtype; bf16 as uint16 bits."""
        rows = self._store["rows"]
        return np.empty((count, rows.shape[1]), np.uint16 if rows.dtype == torch.bfloat16 else np.float32)

    def serve(self, request: Request, send_mask: np.ndarray, recv_mask: np.ndarray, rows: np.ndarray) -> None:
        """Move the rows that bool `send_mask` [W] marks at the owners to the places in `rows` [U, D] that bool
        `recv_mask` [U] marks at the askers."""
        values = self._gather(request.wanted[send_mask])
        rows[recv_mask] = self._exchange.to_askers_where(request, send_mask, values, recv_mask)

    def to_owners(self, request: Request, gradient: Tensor, computed: Event) -> np.ndarray:
        """Gradients of the asked rows [U, D] -> gradients of the wanted rows [W, D]; valid until the next call."""
        return self._exchange.to_owners(request, self._copy.to_host(gradient, computed))

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        table = self._store["rows"]
        if not self._store.on_host:
            return host_array(self._copy.fetch(lambda: table[torch.from_numpy(rows).to(table.device)]))
        values, start = self._store.columns("rows")
        out = self.empty(len(rows))
        self._threads.run(len(rows), lambda part: kernels.gather(values, start, rows[part], out[part]))
        return out


class InPlace:
    """A kernel on the worker's stream gathers rows from where they are stored: device memory, or pinned host memory,
    which it reads over the bus without the host's processors. For one rank.

    Transfers are exact if gathers and updates take effect in the order of the worker's jobs; the proof in `hazards.py`
    assumes nothing else about a table. The worker does not wait for gathers, but the order holds:
    - An update of rows on the device is queued on the same stream. It runs after the gathers of earlier jobs and before
      the gathers of later jobs.
    - An update of rows on the host begins when the stream has finished everything queued on it (`settle`), including
      the gathers of earlier jobs. The gathers of later jobs are launched after the update, and a kernel sees what the
      host wrote before its launch.
    The wait costs almost nothing, since the gradients of the update arrive over the same stream, after these gathers.
    It is needed where no gradients enforce the order: for steps without gradients, and for rows handed out stale.
    """

    def __init__(self, store: Store, copy: DeviceCopy) -> None:
        self._store, self._copy = store, copy
        if store.on_host and copy.device.type == "cuda":
            store.pin("rows")  # moments are only read by the host

    def empty(self, count: int) -> Tensor:
        """An uninitialised tensor fp32 [count, D] on the device."""
        return self._copy.empty(count, self._store["rows"].shape[1])

    def serve(self, request: Request, send_mask: np.ndarray, recv_mask: np.ndarray, rows: Tensor) -> None:
        """As `ThroughHost.serve`. The only rank asks itself, so both masks mark the same rows."""
        from kmem_kernels.row_gather.op import row_gather

        places = np.flatnonzero(recv_mask)
        if len(places) == 0:
            return

        def gather() -> None:
            if len(places) == len(rows):
                (wanted,) = self._copy.upload(request.wanted)
                row_gather(self._store["rows"], wanted, rows)
            else:
                wanted, at = self._copy.upload(request.wanted[send_mask], places)
                row_gather(self._store["rows"], wanted, rows, at)

        self._copy.run(gather)

    def to_owners(self, request: Request, gradient: Tensor, computed: Event) -> np.ndarray | Tensor:
        """The gradient [U, D] in the memory of the rows: a host array, or a device tensor."""
        if self._store.on_host:
            return self._copy.to_host(gradient, computed)
        return self._copy.take_over(gradient, computed)
