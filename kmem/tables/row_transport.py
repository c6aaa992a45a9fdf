"""How rows get from their owners into a step's working set, and its gradient back: through the host, or in place."""

import logging

import numpy as np
import torch
from torch import Tensor

from kmem.tables.device_copy import DeviceCopy
from kmem.tables.exchange import Exchange, Request
from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers.update import host_array, host_columns
from kmem.tables.row_threads import RowThreads
from kmem.tables.stores import Store

log = logging.getLogger(__name__)


def make_row_transport(
    store: Store, exchange: Exchange, threads: RowThreads, copy: DeviceCopy
) -> "ThroughHost | InPlace":
    """The way that a table goes, always the same one: in place where rows need not leave the rank and a device can read
    them, which is on CUDA, with one rank, from the stores `device` and `host`."""
    if copy.device.type == "cuda" and exchange.ranks == 1 and store.kind in ("device", "host"):
        log.info("table %s: the device gathers rows from %s memory in place", store.name, store.kind)
        return InPlace(store, copy)
    return ThroughHost(store, exchange, threads, copy)


class ThroughHost:
    """Owners gather rows into host memory, ranks exchange them there, and each copies its working set to its device at
    once. Any store, any number of ranks."""

    def __init__(self, store: Store, exchange: Exchange, threads: RowThreads, copy: DeviceCopy) -> None:
        self._store, self._exchange, self._threads, self._copy = store, exchange, threads, copy

    def empty(self, count: int) -> np.ndarray:
        """[count, D] for rows in the table's own type; bf16 as its bits."""
        rows = self._store["rows"]
        return np.empty((count, rows.shape[1]), np.uint16 if rows.dtype == torch.bfloat16 else np.float32)

    def serve(self, request: Request, sent: np.ndarray, due: np.ndarray, rows: np.ndarray) -> None:
        """Bring the rows marked at the owners (`sent` [W]) to their places at the askers (`due` [U])."""
        rows[due] = self._exchange.to_askers_where(request, sent, self._gather(request.wanted[sent]), due)

    def to_owners(self, request: Request, gradient: Tensor, computed: object) -> np.ndarray:
        """Gradients of the asked rows [U, D] -> of the wanted rows [W, D]; valid until the next call."""
        return self._exchange.to_owners(request, self._copy.to_host(gradient, computed))

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        table = self._store["rows"]
        if not self._store.on_host:
            self._copy.settle()
            return host_array(table[torch.from_numpy(rows).to(table.device)].cpu())
        values, start = host_columns(self._store, "rows")
        out = self.empty(len(rows))
        self._threads.run(len(rows), lambda part: kernels.gather(values, start, rows[part], out[part]))
        return out


class InPlace:
    """A kernel on the worker's stream gathers rows where they are stored: in device memory, or in pinned host memory,
    over the bus and without the host's processors. One rank.

    Exact as long as gathers and updates take effect in the order of the worker's jobs, which is all that the proof in
    `hazards.py` takes from a table. The worker does not wait for gathers, but
    - an update of rows on the device is given to the same stream: it runs behind the gathers of earlier jobs and before
      those of later ones;
    - an update of rows on the host begins when the stream has done all that it was given (`settle`), the gathers of
      earlier jobs included; those of later jobs are launched when it has ended, and kernels see what the host wrote
      before their launch.
    The wait costs next to nothing: the gradients of the update come over the same stream, behind these gathers. It is
    there for what the gradients do not order: steps without gradients, and rows handed out stale.
    """

    def __init__(self, store: Store, copy: DeviceCopy) -> None:
        self._store, self._copy = store, copy

    def empty(self, count: int) -> Tensor:
        """fp32 [count, D] on the device."""
        return self._copy.empty(count, self._store["rows"].shape[1])

    def serve(self, request: Request, sent: np.ndarray, due: np.ndarray, rows: Tensor) -> None:
        """Bring the marked rows to their places. The only rank asks itself: `sent` and `due` mark the same ones."""
        from kmem_kernels.row_gather.op import row_gather

        places = np.flatnonzero(due)
        if len(places) == 0:
            return

        def gather() -> None:
            if len(places) == len(rows):
                (wanted,) = self._copy.upload(request.wanted)
                row_gather(self._store["rows"], wanted, rows)
            else:
                wanted, at = self._copy.upload(request.wanted[sent], places)
                row_gather(self._store["rows"], wanted, rows, at)

        self._copy.run(gather)

    def to_owners(self, request: Request, gradient: Tensor, computed: object) -> np.ndarray | Tensor:
        """The gradient [U, D] where the rows are."""
        if self._store.on_host:
            return self._copy.to_host(gradient, computed)
        return self._copy.take_over(gradient, computed)
