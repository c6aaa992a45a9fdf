"""A trainable lookup table: rows sharded over ranks, fetched per step, updated where they are stored.

    next_ticket = table.begin(plan)             # at any time, also while an earlier step is computed
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
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from kmem.checkpoint.pieces import Pieces
from kmem.config import RowOptimizerConfig, UserError
from kmem.tables import counter_random
from kmem.tables.device_copy import DeviceCopy
from kmem.tables.exchange import Request
from kmem.tables.hazards import Hazards
from kmem.tables.row_optimizers import RowOptimizer, RowUpdate, make_row_optimizer
from kmem.tables.row_optimizers.update import host_array
from kmem.tables.row_threads import RowThreads
from kmem.tables.row_transport import make_row_transport
from kmem.tables.segments import Segments
from kmem.tables.sharding import RowSelection, row_range
from kmem.tables.stores import CHUNK_BYTES, ArrayLayout, Store
from kmem.tables.table_spec import DTYPES, StepMetrics, TableSpec
from kmem.tables.worker import TableWorker
from kmem.tables.working_set import StepPlan, WorkingSet

Planned = Tensor | Callable[[], StepPlan]
"""What a step reads: row ids int64 [M, ..] in host memory, of M micro-batches, unchanged until the rows are there; or a
function that the worker calls for the plan."""


class _Step:
    """A step in the worker's hands. Filled by the begin job."""

    def __init__(self, number: int, ready: Future) -> None:
        self.number, self.ready = number, ready
        self.metrics = StepMetrics()
        self.ended = False
        self.plan: StepPlan
        self.request: Request
        self.owned: Segments
        """Local rows that any rank asked for, and whose gradients belong to each, in the order of the ranks."""
        self.rows: Any
        """[U, D], of `serving`."""
        self.fresh_wanted: np.ndarray
        self.fresh_asked: np.ndarray


class Ticket:
    """A step's rows, from `begin` to `commit`. Leaving its context without a commit skips the step."""

    def __init__(self, table: "Table", step: _Step) -> None:
        self._table, self._step = table, step
        self._working_set: WorkingSet | None = None

    def result(self) -> WorkingSet:
        """Wait for the rows; the same object every time.

        Raises:
            ExchangeError: the exchange failed on this or another rank.
        """
        if self._working_set is None:
            self._working_set = self._table._receive(self._step)
        return self._working_set

    @property
    def metrics(self) -> StepMetrics:
        """Of this step; complete when the commit has been done."""
        return self._step.metrics

    @property
    def owned_rows(self) -> Tensor:
        """int64, ascending: local numbers of the rows of this rank that any rank asked for; known with the result."""
        return torch.from_numpy(self._step.owned.unique)

    def commit(self, scale: float, learning_rate: float, skip: bool = False) -> None:
        """Queue the update of this step's rows; `skip` leaves them as they are, which all ranks must agree on.

        Args:
            scale: factor on the summed gradients of all ranks.
            learning_rate: of the rows, multiplier included.
        """
        assert not self._step.ended, "this step has been committed or skipped before"
        assert skip or self._table.trained, "frozen rows have no updates"
        self._table._end(self._step, None if skip else self._working_set, scale, learning_rate, skip)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._step.ended:
            self.commit(0.0, 0.0, skip=True)


class Table:
    """The rows of a table that this rank owns, and the way to everybody else's.

    Args:
        spec: the table.
        optimizer: of its rows; None: they are frozen, without gradients and state, and every step is skipped.
        worker: this rank's memory thread, shared by its tables.
        device: where working sets are used; also of the "device" store.
        staleness: earlier steps whose commits a row need not wait for; 0 is exact.
        depth: steps that may be begun beyond the one being computed.
        threads: host threads that share the rows of a gather or an update.
        initialise: draw the first rows now; otherwise they are zeros until `initialise` or a load.
        norm_group: ranks over which the norm of a clipped gradient is summed, where a table is a part of something
            larger; they all commit in the same order. Default: those that share the table.

    Raises:
        UserError: the parts do not fit together.
        StoreError: the store cannot be had.
    """

    def __init__(
        self,
        spec: TableSpec,
        optimizer: RowOptimizerConfig | None,
        worker: TableWorker,
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
        # The busy counts lie with the rows, so that a mapped table needs no memory per row.
        busy = {"busy": ArrayLayout(1, torch.uint8)}
        on_device = spec.store == "device" and torch.device(device).type != "cpu"
        self.store = Store(spec.store, len(self.local), layout | ({} if on_device else busy), device, path, spec.name)
        self._transport = make_row_transport(self.store, self._exchange, self._threads, self._copy)
        self._hazards = Hazards(
            np.zeros(len(self.local), np.uint8) if on_device else host_array(self.store["busy"])[:, 0],
            depth if optimizer is None else staleness,  # nothing need be waited for
        )
        self._optimizer_step = torch.zeros(1, dtype=torch.int64)
        self._begun = 0
        self._open: list[_Step] = []
        """Main thread: begun, neither commit nor skip queued."""
        self._unserved: list[_Step] = []
        """Worker: begun, waiting for rows in conflict."""
        self._finished: deque[StepMetrics] = deque(maxlen=1000)
        if initialise:
            self.initialise()

    def initialise(self) -> None:
        """Draw the first rows, which follow from the seed, the table's name and their numbers alone, or are given."""
        spec, first = self.spec, self.local.start
        stream = counter_random.key(spec.seed, spec.name)

        def values(start: int, stop: int) -> Tensor:
            return torch.from_numpy(
                counter_random.normal_rows(first + start, first + stop, spec.dim, stream, spec.init_std)
            )

        if spec.initial_rows is not None:
            given = spec.initial_rows
            self.store.fill("rows", lambda start, stop: given(first + start, first + stop))
        elif spec.init_std:
            self.store.fill("rows", values)

    def begin(self, plan: Planned) -> Ticket:
        """Start fetching a step's rows."""
        assert len(self._open) <= self.depth, f"{len(self._open)} steps are begun, prefetch depth is {self.depth}"
        step = _Step(self._begun, self._worker.promise())
        self._begun += 1
        self._open.append(step)
        written = self._written(step.number)
        self._worker.submit(lambda: self._fetch(step, self._made(plan), written))
        return Ticket(self, step)

    def evaluate(self, plan: Planned) -> WorkingSet:
        """Rows as the last queued commit leaves them, read only; steps in flight do not notice."""
        written = self._written(self._begun)
        working_set, arrived = self._worker.call(lambda: self._fetch_unchanging(self._made(plan), written))
        return self._copy.hand_over(working_set, arrived)

    @property
    def trained(self) -> bool:
        """Whether the rows have an optimizer."""
        return self._optimizer is not None

    @property
    def in_flight(self) -> int:
        """Steps that are begun, and neither committed nor skipped."""
        return len(self._open)

    @property
    def step(self) -> int:
        """Optimizer steps done; skipped ones do not count."""
        return int(self._optimizer_step)

    def take_metrics(self) -> list[StepMetrics]:
        """Metrics of the steps committed since the last call, oldest first."""
        taken = []
        while self._finished:
            taken.append(self._finished.popleft())
        return taken

    def drain(self) -> None:
        """Wait until everything queued is done: rows and state are then those of the last commit."""
        self._worker.call(self._copy.settle)

    def arrays(self) -> dict[str, int]:
        """Array (`rows`, the state of its optimizer) -> values per row."""
        return {name: self.store[name].shape[1] for name in ("rows", *self._state)}

    def pieces(self, columns: Mapping[str, slice] | None = None) -> dict[str, Pieces]:
        """Array (`rows`, the state of its optimizer, `step`) -> this rank's part: live views of what the last commit
        left.

        A save must end before the next commit; a load must come before the first `begin`, which it does not reach.

        Args:
            columns: array -> those of its columns that count; default: all.
        """
        self.drain()
        pieces = {name: self._interval(name, (columns or {}).get(name, slice(None))) for name in self.arrays()}
        return pieces | ({} if self._optimizer is None else {"step": Pieces.interval(1, 0, self._optimizer_step)})

    def as_pieces(self, values: Tensor, fetch: Callable[[int, int], object] | None = None) -> Pieces:
        """Values [local rows, W] of this rank's rows as its part of those of all; of a selection, of the whole table
        that it is taken from.

        Args:
            fetch: called with the local rows [first, last) that are about to be touched.
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
        """Let rows that have moments count as many updates as the table has made steps: what corrected them before
        rows counted their own."""
        self.drain()
        moments, step = self.store["second_moment"], int(self._optimizer_step)
        for start, stop in self.store.chunks("second_moment"):
            self.store.fetch_ahead(np.arange(start, stop))
            self.store["updates"][start:stop] = step * (moments[start:stop] != 0).any(dim=1, keepdim=True)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, D] fp32 copy of rows of this rank, by their numbers in the table, after the last commit."""
        assert self.local.start <= start <= stop <= self.local.stop, "these rows belong to another rank"
        self.drain()
        part = self.store["rows"][start - self.local.start : stop - self.local.start]
        return part.to("cpu", torch.float32, copy=True)

    def squares(self, rows: Tensor, columns: Sequence[slice]) -> Tensor:
        """fp64 [n]: sums of the squares of these columns of some rows of this rank, by their local numbers int64 [n],
        after the last commit."""

        def squares() -> Tensor:
            self._copy.settle()
            values, found = self.store["rows"], []
            widest = max((part.stop - part.start for part in columns), default=1)
            self.store.fetch_ahead(rows.numpy(), writing=False)
            for some in rows.to(values.device).split(max(1, CHUNK_BYTES // (8 * widest))):
                parts = [values[:, part].index_select(0, some).double().square().sum(1) for part in columns]
                found.append(torch.stack(parts).sum(0))
            return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)

        return self._worker.call(squares)

    def row_norms(self, count: int) -> Tensor:
        """fp64 [count]: 2-norms of `count` rows evenly spaced over the whole table, 0 where another rank owns them."""
        numbers = torch.arange(count) * self.spec.rows // count

        def norms() -> Tensor:
            self._copy.settle()
            mine = (numbers >= self.local.start) & (numbers < self.local.stop)
            rows = self.store["rows"]
            values = rows[(numbers[mine] - self.local.start).to(rows.device)].double().norm(dim=1)
            return torch.zeros(count, dtype=torch.float64).masked_scatter_(mine, values.cpu())

        return self._worker.call(norms)

    def close(self) -> None:
        """Skip what is in flight and give back the memory; a mapped file is deleted. The worker goes on."""
        if self._worker.error is None:
            for step in list(self._open):
                self._end(step, None, 0.0, 0.0, skip=True)
            self.drain()
        self._threads.close()
        self._copy.close()
        self._hazards.busy = np.zeros(0, np.uint8)
        self.store.close()

    def __enter__(self) -> "Table":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Other ranks may not have failed: what is queued here would wait for exchanges that do not match.
            self._worker.fail(error)
        self.close()

    # Main thread, on behalf of tickets.

    def _written(self, step: int) -> object:
        """What the worker waits for on the device before step 0: initial or loaded rows."""
        return self._copy.mark() if step == 0 else None

    def _receive(self, step: _Step) -> WorkingSet:
        blocking = [other.number for other in self._open if other.number < step.number - self._hazards.staleness]
        assert not blocking, f"step {step.number} waits for steps {blocking}, which must be committed or skipped first"
        began = time.perf_counter()
        working_set, arrived = self._worker.wait(step.ready)
        step.metrics.stall_ms = 1e3 * (time.perf_counter() - began)
        return self._copy.hand_over(working_set, arrived)

    def _end(self, step: _Step, working_set: WorkingSet | None, scale: float, rate: float, skip: bool) -> None:
        assert skip or step is self._open[0], "steps are committed in the order in which they were begun"
        step.ended = True
        self._open.remove(step)
        computed = self._copy.mark()
        gradient = None if working_set is None else working_set.gradient
        self._worker.submit(lambda: self._finish(step, gradient, computed, scale, rate, skip))

    # Worker thread.

    @record_function("kmem: fetch")
    def _fetch(self, step: _Step, plan: StepPlan, written: object) -> None:
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

    def _fresh(self, step: _Step) -> np.ndarray:
        """True for the wanted rows that may be handed out now. The dense form of an optimizer moves rows that no step
        holds, so nothing may go out before all earlier steps have been committed."""
        fresh = self._hazards.begin(step.number, step.request.wanted, step.owned.unique)
        if self._optimizer is not None and self._optimizer.settings.is_dense and self._hazards.waits(step.number):
            fresh[:] = False
        return fresh

    @record_function("kmem: update")
    def _finish(
        self, step: _Step, gradient: Tensor | None, computed: object, scale: float, rate: float, skip: bool
    ) -> None:
        sent = self._exchange.bytes
        self._hazards.end(step.number)
        if not skip:
            optimizer = self._optimizer
            assert optimizer is not None
            if gradient is None:  # a rank whose lookups had no gradient still takes part
                gradient = self._copy.zeros(len(step.fresh_asked), self.spec.dim)
            wanted = self._transport.to_owners(step.request, gradient, computed)
            began = time.perf_counter()
            self._optimizer_step += 1
            update = RowUpdate(step.owned, wanted, scale, int(self._optimizer_step), rate)
            if self.store.on_host:
                self._copy.settle()  # gathers in place have read what is written now
                optimizer.apply(self.store, update, self.local.start)
            else:
                self._copy.run(lambda: optimizer.apply(self.store, update, self.local.start))
            step.metrics.owner_ms = 1e3 * (time.perf_counter() - began)
        step.metrics.bytes += self._exchange.bytes - sent
        self._finished.append(step.metrics)
        if step in self._unserved:  # skipped before its rows were due
            self._unserved.remove(step)
            step.ready.cancel()
        for other in [other for other in self._unserved if not self._hazards.waits(other.number)]:
            began, sent = time.perf_counter(), self._exchange.bytes
            self._transport.serve(other.request, ~other.fresh_wanted, ~other.fresh_asked, other.rows)
            other.metrics.bytes += self._exchange.bytes - sent
            other.metrics.fetch_ms += 1e3 * (time.perf_counter() - began)
            self._unserved.remove(other)
            self._hand_out(other)

    def _hand_out(self, step: _Step) -> None:
        step.ready.set_result(self._copy.working_set(step.rows, step.plan, self.trained))

    def _fetch_unchanging(self, plan: StepPlan, written: object) -> tuple[WorkingSet, object]:
        self._copy.follow(written)
        unique = plan.rows
        request = self._exchange.request(unique, self.spec.rows)
        self.store.fetch_ahead(request.wanted, writing=False)
        rows: Any = self._transport.empty(len(unique))
        self._transport.serve(request, np.ones(len(request.wanted), bool), np.ones(len(unique), bool), rows)
        return self._copy.working_set(rows, plan, trainable=False)

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
