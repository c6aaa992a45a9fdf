"""A trainable lookup table: rows sharded over ranks, fetched per step, updated where they are stored.

    next_ticket = table.begin(plan)             # at any time, even while an earlier step is being computed
    working_set = ticket.result()               # waits for the rows
    ... forward and backward passes through working_set.lookup(micro_batch) ...
    ticket.commit(scale=1 / data_ranks, learning_rate=rate)

All ranks that share the table make the same calls in the same order.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kmem.checkpoint.pieces import Pieces
from kmem.config import RowOptimizerConfig, UserError
from kmem.tables import counter_random
from kmem.tables.device_copy import DeviceCopy, Event
from kmem.tables.exchange import Request
from kmem.tables.hazards import Hazards
from kmem.tables.row_optimizers import RowOptimizer, RowUpdate, make_row_optimizer
from kmem.tables.row_optimizers.update import sum_by_row
from kmem.tables.row_threads import RowThreads
from kmem.tables.row_transport import make_row_transport
from kmem.tables.segments import Segments
from kmem.tables.sharding import RowSelection, row_range
from kmem.tables.stores import CHUNK_BYTES, ArrayLayout, Store, host_array
from kmem.tables.table_spec import DTYPES, StepMetrics, TableSpec
from kmem.tables.worker import InlineWorker, TableWorker
from kmem.tables.working_set import StepPlan, WorkingSet

# Shape letters: M micro-batches, U unique rows that a step of this rank reads, W rows that all ranks want from this
# one, D values of a row.

Planned = Tensor | Callable[[], StepPlan]
"""The rows that a step reads: row ids int64 [M, ..] in host memory, which may not change until the rows have arrived;
or a function that the worker calls to get the plan."""


class Ticket:
    """The rows of a step, from `begin` to `commit`."""

    def __init__(self, table: "Table", number: int, ready: Future) -> None:
        self._table, self.number, self.ready = table, number, ready
        self.metrics = StepMetrics()
        """The metrics of this step; complete after the worker has done the commit."""
        self.ended = False
        self._working_set: WorkingSet | None = None
        # The worker's record of the step, which the begin job fills.
        self.plan: StepPlan
        self.request: Request
        self.owned: Segments
        """Local rows that any rank asked for, and the received gradients that belong to each, in the order of ranks."""
        self.rows: Any
        """[U, D], filled by the row transport."""
        self.fresh_wanted: np.ndarray
        """bool [W], True for wanted rows that could be handed out at once."""
        self.fresh_asked: np.ndarray
        """bool [U], the same for the rows that this rank asked for."""

    def result(self) -> WorkingSet:
        """Wait for the rows. Further calls return the same object.

        Raises:
            ExchangeError: the exchange failed on this or another rank.
        """
        if self._working_set is None:
            self._working_set = self._table._receive(self)
        return self._working_set

    @property
    def owned_rows(self) -> Tensor:
        """int64, ascending: local numbers of this rank's rows that any rank asked for. Call `result` first."""
        return torch.from_numpy(self.owned.unique)

    def commit(self, scale: float, learning_rate: float, skip: bool = False) -> None:
        """Queue the update of this step's rows.

        Args:
            scale: factor on the summed gradients of all ranks.
            learning_rate: learning rate of the rows, multiplier included.
            skip: leave the rows unchanged; all ranks must pass the same value.
        """
        assert not self.ended, "this step has been committed or skipped before"
        assert skip or self._table.trained, "frozen rows have no updates"
        self._table._end(self, None if skip else self._working_set, scale, learning_rate, skip)


class Table:
    """The rows of a table that this rank owns, and access to the rows of all ranks.

    Args:
        spec: the description of the table.
        optimizer: the optimizer of the rows. None: the rows are frozen, without gradients and optimizer state, and
            every step is skipped.
        worker: this rank's worker thread, shared by its tables; or `InlineWorker`, for a table that layers look up in
            the forward pass.
        device: device where working sets are used, and device of the "device" store.
        staleness: number of earlier steps whose commits a row need not wait for; 0 is exact.
        depth: number of steps that may be begun beyond the one being computed.
        threads: number of host threads that share the rows of a gather or an update.
        initialise: draw the initial rows now; otherwise they are zeros until `initialise` or a load.
        norm_group: ranks over which the norm of a clipped gradient is summed, if the table is a part of something
            larger; they must all commit in the same order. Default: the ranks that share the table.

    Raises:
        UserError: the arguments do not fit together.
        StoreError: the memory or disk space of the store is not available.
    """

    def __init__(
        self,
        spec: TableSpec,
        optimizer: RowOptimizerConfig | None,
        worker: TableWorker | InlineWorker,
        device: torch.device | str = "cpu",
        staleness: int = 0,
        depth: int = 1,
        threads: int = 1,
        initialise: bool = True,
        norm_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert 0 <= staleness <= depth < 255
        self.spec, self.depth = spec, depth
        self._worker, self._exchange = worker, worker.exchange
        self.local = row_range(spec.rows, self._exchange.ranks, self._exchange.rank)
        dtype = DTYPES[spec.dtype]
        self._threads = RowThreads(threads, spec.dim)
        self._copy = DeviceCopy(torch.device(device), depth)
        self._optimizer: RowOptimizer | None = None
        self._state: dict[str, ArrayLayout] = {}
        if optimizer is not None:
            assert not (optimizer.is_dense and spec.store == "mmap"), "a mapped file cannot serve passes over all rows"
            assert not optimizer.stochastic_rounding or dtype == torch.bfloat16
            self._optimizer = make_row_optimizer(
                optimizer,
                spec.dim,
                spec.seed,
                spec.name,
                self._threads,
                lambda values: self._exchange.sum_over_ranks(values, norm_group),
                self._copy.upload,
            )
            self._state = self._optimizer.state()
        path = None if spec.folder is None else spec.folder / f"{spec.name}.rank-{self._exchange.rank}.rows"
        layout = {"rows": ArrayLayout(spec.dim, dtype), **self._state}
        # The busy counts are stored with the rows, so that a mapped table needs no memory per row.
        busy = {"busy": ArrayLayout(1, torch.uint8)}
        on_device = spec.store == "device" and torch.device(device).type != "cpu"
        self.store = Store(spec.store, len(self.local), layout | ({} if on_device else busy), device, path, spec.name)
        self._transport = make_row_transport(self.store, self._exchange, self._threads, self._copy)
        self._hazards = Hazards(
            np.zeros(len(self.local), np.uint8) if on_device else host_array(self.store["busy"])[:, 0],
            depth if optimizer is None else staleness,  # frozen rows need not wait for anything
        )
        self._optimizer_step = torch.zeros(1, dtype=torch.int64)
        """Number of optimizer steps done; skipped steps do not count."""
        self._begun = 0
        self._open: list[Ticket] = []
        """Steps that have begun, without a queued commit or skip. For the main thread."""
        self._unserved: list[Ticket] = []
        """Steps that have begun and wait for rows in conflict. For the worker thread."""
        self._finished: deque[StepMetrics] = deque(maxlen=1000)
        if initialise:
            self.initialise()

    def initialise(self) -> None:
        """Set the initial rows: from `spec.initial_rows` if it is given, else drawn. Drawn rows depend on the seed, the
        table's name and the row numbers alone."""
        spec, first = self.spec, self.local.start
        rows: Callable[[int, int], Tensor | np.ndarray] | None = spec.initial_rows
        if rows is None and spec.init_std:
            stream = counter_random.key(spec.seed, spec.name)
            rows = partial(counter_random.normal_rows, dim=spec.dim, stream=stream, std=spec.init_std)
        if rows is not None:
            self.store.fill("rows", lambda start, stop: rows(first + start, first + stop))

    def begin(self, plan: Planned) -> Ticket:
        """Start fetching a step's rows."""
        assert len(self._open) <= self.depth, f"{len(self._open)} steps are begun, prefetch depth is {self.depth}"
        step = Ticket(self, self._begun, self._worker.promise())
        self._begun += 1
        self._open.append(step)
        written = self._written(step.number)
        self._worker.submit(lambda: self._fetch(step, self._made(plan), written))
        return step

    def evaluate(self, plan: Planned, trainable: bool = False) -> WorkingSet:
        """Read rows in the state after the last queued commit. Does not affect steps in flight.

        Args:
            trainable: whether look-ups collect gradients, for `owner_sums` and `update`.
        """
        written = self._written(self._begun)
        working_set, arrived = self._worker.call(lambda: self._fetch_unchanging(self._made(plan), written, trainable))
        return self._copy.hand_over(working_set, arrived)

    def owner_sums(self, rows: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Send gradients fp32 [U, D] of distinct rows [U], ascending, to the owners. Returns (local numbers of this
        rank's rows for which gradients came, ascending; their sums in the order of ranks)."""

        def summed() -> tuple[np.ndarray, np.ndarray]:
            request = self._exchange.request(rows, self.spec.rows)
            return sum_by_row(request.wanted, self._exchange.to_owners(request, gradient))

        return self._worker.call(summed)

    def update(self, rows: np.ndarray, gradients: np.ndarray, scale: float, learning_rate: float) -> None:
        """Update rows of this rank that no step holds: local numbers [W] and gradients fp32 [W, D], which are summed in
        their order. `scale` and `learning_rate` as in `Ticket.commit`; all ranks that share the table call it."""
        assert not self._open, "steps in flight hold rows"

        def update() -> None:
            segments = Segments.of(rows)
            self.store.fetch_ahead(segments.unique)
            self._apply(segments, gradients, scale, learning_rate)

        self._worker.call(update)

    @property
    def trained(self) -> bool:
        """Whether the rows have an optimizer."""
        return self._optimizer is not None

    @property
    def in_flight(self) -> int:
        """Number of steps that have begun, and are neither committed nor skipped."""
        return len(self._open)

    def take_metrics(self) -> list[StepMetrics]:
        """The metrics of the steps that ended since the last call, oldest first."""
        taken = []
        while self._finished:
            taken.append(self._finished.popleft())
        return taken

    def drain(self) -> None:
        """Wait until everything queued is done. Rows and optimizer state are then in the state after the last
        commit."""
        self._worker.call(self._copy.settle)

    def arrays(self) -> dict[str, int]:
        """Name of each array (`rows` and the optimizer state) -> number of values per row."""
        return {name: self.store[name].shape[1] for name in ("rows", *self._state)}

    def pieces(self, columns: Mapping[str, slice] | None = None) -> dict[str, Pieces]:
        """Name of each array (`rows`, the optimizer state, `step`) -> this rank's part, as live views in the state
        after the last commit.

        A save must end before the next commit. A load must come before the first `begin`: rows that a step has already
        fetched do not change.

        Args:
            columns: array -> slice of its columns to use; default: all columns.
        """
        self.drain()
        pieces = {name: self._interval(name, (columns or {}).get(name, slice(None))) for name in self.arrays()}
        return pieces | ({} if self._optimizer is None else {"step": Pieces.interval(1, 0, self._optimizer_step)})

    def as_pieces(self, values: Tensor, fetch: Callable[[int, int], object] | None = None) -> Pieces:
        """This rank's part of an array [all rows, width], from its values [local rows, width]. If the table is a
        selection, the array has the rows of the larger table.

        Args:
            fetch: called with the local rows [first, last) before they are touched.
        """
        selection, width = self.spec.selection, values.shape[1]
        if selection is None:
            selection = RowSelection(self.spec.rows, (range(self.spec.rows),))
        length = selection.whole * width
        pieces = Pieces(length, [])
        for before, rows in selection.cut(self.local.start, self.local.stop):
            shifted = None if fetch is None else partial(_shifted, fetch, before)
            part = values[before : before + len(rows)]
            pieces.parts += Pieces.interval(length, rows.start * width, part, shifted).parts
        return pieces

    def count_updates(self) -> None:
        """Set the update count of every row with moments to the table's number of steps. For checkpoints from before
        rows counted their own updates, when the bias correction used the table's steps."""
        self.drain()
        moments, step = self.store["second_moment"], int(self._optimizer_step)
        for start, stop in self.store.chunks("second_moment"):
            self.store.fetch_ahead(np.arange(start, stop))
            self.store["updates"][start:stop] = step * (moments[start:stop] != 0).any(dim=1, keepdim=True)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """A copy, fp32 [stop - start, D], of this rank's rows [start, stop), numbered as in the table, after the last
        commit."""
        assert self.local.start <= start <= stop <= self.local.stop, "these rows belong to another rank"
        self.drain()
        part = self.store["rows"][start - self.local.start : stop - self.local.start]
        return part.to("cpu", torch.float32, copy=True)

    def squares(self, rows: Tensor, columns: Sequence[slice]) -> Tensor:
        """fp64 [n]: for each local row in `rows` int64 [n], the sum of the squares of the values in `columns`, after
        the last commit."""

        def squares() -> Tensor:
            self._copy.settle()
            values, sums = self.store["rows"], []
            widest = max((part.stop - part.start for part in columns), default=1)
            self.store.fetch_ahead(rows.numpy(), writing=False)
            for chunk in rows.to(values.device).split(max(1, CHUNK_BYTES // (8 * widest))):
                parts = [values[:, part].index_select(0, chunk).double().square().sum(1) for part in columns]
                sums.append(torch.stack(parts).sum(0))
            return torch.cat(sums).cpu() if sums else torch.zeros(0, dtype=torch.float64)

        return self._worker.call(squares)

    def row_norms(self, count: int) -> Tensor:
        """fp64 [count]: 2-norms of `count` rows, evenly spaced over the whole table; 0 for rows of other ranks."""
        numbers = torch.arange(count) * self.spec.rows // count

        def norms() -> Tensor:
            self._copy.settle()
            mine = (numbers >= self.local.start) & (numbers < self.local.stop)
            rows = self.store["rows"]
            values = rows[(numbers[mine] - self.local.start).to(rows.device)].double().norm(dim=1)
            return torch.zeros(count, dtype=torch.float64).masked_scatter_(mine, values.cpu())

        return self._worker.call(norms)

    def close(self) -> None:
        """Skip the steps in flight and free the memory; a mapped file is deleted. The worker stays open."""
        if self._worker.error is None:
            for step in list(self._open):
                self._end(step, None, 0.0, 0.0, skip=True)
            self.drain()
        self._threads.close()
        self._copy.close()
        self._hazards.busy = np.zeros(0, np.uint8)
        self.store.close()

    # Main thread, on behalf of tickets.

    def _written(self, step: int) -> Event:
        """The event for which the worker's stream waits before step 0: initial or loaded rows are written."""
        return self._copy.mark() if step == 0 else None

    def _receive(self, step: Ticket) -> WorkingSet:
        blocking = [other.number for other in self._open if other.number < step.number - self._hazards.staleness]
        assert not blocking, f"step {step.number} waits for steps {blocking}: commit or skip them first"
        began = time.perf_counter()
        working_set, arrived = self._worker.wait(step.ready)
        step.metrics.stall_ms = 1e3 * (time.perf_counter() - began)
        return self._copy.hand_over(working_set, arrived)

    def _end(self, step: Ticket, working_set: WorkingSet | None, scale: float, rate: float, skip: bool) -> None:
        assert skip or step is self._open[0], "steps are committed in the order in which they were begun"
        step.ended = True
        self._open.remove(step)
        computed = self._copy.mark()
        gradient = None if working_set is None else working_set.gradient
        self._worker.submit(lambda: self._finish(step, gradient, computed, scale, rate, skip))

    # Worker thread.

    @record_function("kmem: fetch")
    def _fetch(self, step: Ticket, plan: StepPlan, written: Event) -> None:
        began, sent = time.perf_counter(), self._exchange.bytes
        self._copy.follow(written)
        step.plan, unique = plan, plan.rows
        step.request = request = self._exchange.request(unique, self.spec.rows)
        step.owned = (Segments.distinct if self._exchange.ranks == 1 else Segments.of)(request.wanted)
        self.store.fetch_ahead(step.owned.unique)  # before the busy counts, which lie in the same pages
        step.fresh_wanted = self._fresh(step)
        step.fresh_asked = self._exchange.to_askers(request, step.fresh_wanted)
        step.rows = self._transport.empty(len(unique))
        self._transport.serve(request, step.fresh_wanted, step.fresh_asked, step.rows)
        step.metrics = replace(
            step.metrics,
            addresses=plan.look_ups,
            unique_rows=len(unique),
            conflict_rows=len(unique) - int(step.fresh_asked.sum()),
            owned_rows=len(step.owned.unique),
            bytes=self._exchange.bytes - sent,
            fetch_ms=1e3 * (time.perf_counter() - began),
        )
        if self._hazards.waits(step.number):
            self._unserved.append(step)
        else:
            self._hand_out(step)

    def _fresh(self, step: Ticket) -> np.ndarray:
        """bool [W]: True for the wanted rows that may be handed out now. A dense optimizer moves even rows that no step
        holds, so no row may be handed out before all earlier steps are committed."""
        fresh = self._hazards.begin(step.number, step.request.wanted, step.owned.unique)
        if self._optimizer is not None and self._optimizer.settings.is_dense and self._hazards.waits(step.number):
            fresh[:] = False
        return fresh

    @record_function("kmem: update")
    def _finish(
        self, step: Ticket, gradient: Tensor | None, computed: Event, scale: float, rate: float, skip: bool
    ) -> None:
        sent = self._exchange.bytes
        self._hazards.end(step.number)
        if not skip:
            if gradient is None:  # a rank without gradients must take part, too
                gradient = self._copy.empty(len(step.fresh_asked), self.spec.dim)
                self._copy.run(gradient.zero_)
            wanted = self._transport.to_owners(step.request, gradient, computed)
            began = time.perf_counter()
            self._apply(step.owned, wanted, scale, rate)
            step.metrics.owner_ms = 1e3 * (time.perf_counter() - began)
        step.metrics.bytes += self._exchange.bytes - sent
        self._finished.append(step.metrics)
        if step in self._unserved:  # the step was skipped before all its rows could be handed out
            self._unserved.remove(step)
            step.ready.cancel()
        for other in [other for other in self._unserved if not self._hazards.waits(other.number)]:
            began, sent = time.perf_counter(), self._exchange.bytes
            self._transport.serve(other.request, ~other.fresh_wanted, ~other.fresh_asked, other.rows)
            other.metrics.bytes += self._exchange.bytes - sent
            other.metrics.fetch_ms += 1e3 * (time.perf_counter() - began)
            self._unserved.remove(other)
            self._hand_out(other)

    def _apply(self, segments: Segments, gradients: np.ndarray | Tensor, scale: float, rate: float) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        self._optimizer_step += 1
        update = RowUpdate(segments, gradients, scale, int(self._optimizer_step), rate)
        if self.store.on_host:
            self._copy.settle()  # gathers in place must have read the rows before they are written
            optimizer.apply(self.store, update, self.local.start)
        else:
            self._copy.run(lambda: optimizer.apply(self.store, update, self.local.start))

    def _hand_out(self, step: Ticket) -> None:
        step.ready.set_result(self._copy.working_set(step.rows, step.plan, self.trained))

    def _fetch_unchanging(self, plan: StepPlan, written: Event, trainable: bool) -> tuple[WorkingSet, Event]:
        self._copy.follow(written)
        unique = plan.rows
        request = self._exchange.request(unique, self.spec.rows)
        self.store.fetch_ahead(request.wanted, writing=False)
        rows: Any = self._transport.empty(len(unique))
        self._transport.serve(request, np.ones(len(request.wanted), bool), np.ones(len(unique), bool), rows)
        return self._copy.working_set(rows, plan, trainable)

    def _made(self, planned: Planned) -> StepPlan:
        plan = StepPlan.of(planned) if isinstance(planned, Tensor) else planned()
        rows = plan.rows
        if len(rows) and not 0 <= rows[0] <= rows[-1] < self.spec.rows:
            raise UserError(
                f"table {self.spec.name} has {self.spec.rows} rows and was asked for rows {rows[0]} to {rows[-1]}"
            )
        return plan

    def _interval(self, name: str, columns: slice) -> Pieces:
        def fetch(first: int, last: int) -> None:
            self.store.fetch_ahead(np.arange(first, last), writing=False, part=(name, columns))

        return self.as_pieces(self.store[name][:, columns], fetch)


def _shifted(fetch: Callable[[int, int], object], rows: int, first: int, last: int) -> None:
    fetch(rows + first, rows + last)
