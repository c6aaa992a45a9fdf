"""Steps of a stage's tables: begun ahead, activated in order, committed or skipped, read for evaluations."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmem.config import TableConfig, UserError
from kmem.config.tables import BlockOptimizerConfig, RowOptimizerConfig
from kmem.parallel import stage_tables
from kmem.parallel.memory_kind import MemoryPlan, StageMemory
from kmem.parallel.mesh import Mesh
from kmem.parallel.stage_tables import StageTables
from kmem.parallel.step_context import StepContext
from kmem.tables.table_spec import TableSpec
from kmem.tables.working_set import StepPlan

ROWS, DIM = 20, 4
CONFIG = SimpleNamespace(parallel=SimpleNamespace(timeout_seconds=20))
ADAM = RowOptimizerConfig(lr_multiplier=5.0)


class StageTable:
    """A table of a kind."""

    norm_group = in_forward = None
    is_copy = False
    rows, folder = ROWS, None

    def __init__(self, name, kind, depth, optimizer):
        self.name, self.section, self.optimizer = name, kind, optimizer
        self.settings = TableConfig(prefetch_depth=depth)

    def spec(self, config):
        store = "host" if self.folder is None else "mmap"
        return TableSpec(self.name, self.rows, DIM, store=store, folder=self.folder, init_std=0.5)

    def pieces(self, table):
        return {self.name: table.pieces()}


class Memory(StageMemory):
    """A kind whose micro-batches are row ids, and which remembers who asked for which plan."""

    def __init__(self, kind, *tables, depth=1, optimizer=ADAM):
        self.kind = kind
        self.tables = [StageTable(name, kind, depth, optimizer) for name in tables]
        self.asked = []

    def plan(self, micro_batches, control=None):
        self.asked.append((threading.current_thread().name, control))
        ids = [batch + 1 for batch in micro_batches] if control == "next" else micro_batches
        beside = [f"{self.kind} {batch.tolist()} {control}" for batch in micro_batches]
        return MemoryPlan({table.name: StepPlan.of(list(ids)) for table in self.tables}, beside)


@pytest.fixture
def stage(alone):
    """stage(*memories) -> their tables, closed at the end."""
    opened = []

    def make(*memories, **arguments):
        opened.append(StageTables(CONFIG, Mesh(0, 1, 1, 1), memories, torch.device("cpu"), **arguments))
        return opened[-1]

    yield make
    for tables in opened:
        tables.close()


def ids(*rows):
    """A step of one micro-batch."""
    return [torch.tensor(rows)]


def rows_of(tables, name):
    return tables.tables[name].read_rows(0, ROWS)


def train(tables, step, rate=0.1):
    """Activate a step, give every looked-up value the gradient 1, and commit; the working sets."""
    found = tables.activate(step).working_sets
    for working_set in found.values():
        if working_set.rows.requires_grad:
            working_set.lookup(0).sum().backward()
    tables.commit(step, rate)
    return found


def test_a_table_of_less_depth_begins_later(stage):
    """Each fetches as far ahead as it may, and all end with the same rows."""
    tables = stage(Memory("deep", "deep", depth=2), Memory("flat", "flat", depth=0))
    steps = [tables.begin(ids(number, 9)) for number in range(3)]
    assert [set(step.tickets) for step in steps] == [{"deep", "flat"}, {"deep"}, {"deep"}]
    before = rows_of(tables, "flat")
    for number, step in enumerate(steps):
        assert [set(later.tickets) for later in steps[number + 1 :]] == [{"deep"}] * (2 - number)
        found = train(tables, step)
        assert set(found) == {"deep", "flat"}
    assert tables.tables["deep"].in_flight == tables.tables["flat"].in_flight == 0
    changed = (rows_of(tables, "flat") != before).any(1).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 9]


def test_no_table_is_begun_beyond_its_depth(stage):
    tables = stage(Memory("deep", "deep", depth=2), Memory("flat", "flat", depth=1))
    steps = [tables.begin(ids(number)) for number in range(3)]
    tables.activate(steps[0])
    steps.append(tables.begin(ids(3)))  # beside the running step
    assert [set(step.tickets) for step in steps] == [{"deep", "flat"}, {"deep", "flat"}, {"deep"}, set()]
    tables.commit(steps[0], 0.1)
    tables.activate(steps[1])
    assert [set(step.tickets) for step in steps[2:]] == [{"deep", "flat"}, {"deep"}]


def test_steps_are_activated_in_the_order_in_which_they_are_begun(stage):
    tables = stage(Memory("one", "table"))
    first, second = tables.begin(ids(1)), tables.begin(ids(2))
    with pytest.raises(AssertionError, match="order"):
        tables.activate(second)
    found = tables.activate(first).working_sets["table"]
    assert torch.equal(found.lookup(0), rows_of(tables, "table")[1:2])


def test_a_step_has_the_rows_that_the_step_before_has_left(stage):
    tables = stage(Memory("one", "table"))
    first, second = tables.begin(ids(1, 2)), tables.begin(ids(2, 3))
    before = rows_of(tables, "table")
    train(tables, first)
    found = tables.activate(second).working_sets["table"].lookup(0)
    assert torch.equal(found, rows_of(tables, "table")[2:4])
    assert not torch.equal(found[0], before[2])
    assert torch.equal(found[1], before[3])


def test_the_plan_of_a_kind_is_made_once_a_step_for_all_of_its_tables(stage):
    one, two = Memory("one", "first", "second"), Memory("two", "third")
    tables = stage(one, two)
    for number in range(3):
        step = tables.begin(ids(number))
        looked_up = tables.activate(step)
        assert set(looked_up.working_sets) == {"first", "second", "third"}
        assert looked_up.beside == {kind: [f"{kind} [{number}] None"] for kind in ("one", "two")}
        tables.commit(step, 0.1)
    assert one.asked == two.asked == [("kmem-tables", None)] * 3  # the worker's thread, beside the running step


def test_the_main_thread_makes_a_plan_that_nobody_has_made(stage):
    """Where it asks first, the worker takes what it made."""
    memory = Memory("one", "table", depth=0)
    tables = stage(memory)
    running, ahead = tables.begin(ids(1)), tables.begin(ids(2))
    tables.activate(running)
    assert set(ahead.tickets) == set()
    plan = ahead.plans["one"]()
    tables.commit(running, 0.1)
    tables.activate(ahead)
    assert ahead.plans["one"]() is plan
    assert [thread for thread, _ in memory.asked] == ["kmem-tables", threading.current_thread().name]


def test_a_kind_without_layers_on_the_stage_plans_nothing(stage):
    elsewhere = Memory("elsewhere")
    tables = stage(elsewhere, Memory("here", "table"))
    step = tables.begin(ids(1))
    assert set(tables.activate(step).beside) == {"here"}
    tables.evaluate(ids(1), {})
    assert elsewhere.asked == []


def test_frozen_tables_are_skipped_and_others_take_the_rate_of_their_optimizer(stage):
    twice = RowOptimizerConfig(lr_multiplier=10.0)
    tables = stage(
        Memory("trained", "trained"),
        Memory("twice", "twice", optimizer=twice),
        Memory("frozen", "frozen", optimizer=None),
    )
    before = {name: rows_of(tables, name) for name in tables.tables}
    found = train(tables, tables.begin(ids(3, 7)), rate=0.01)
    assert not found["frozen"].rows.requires_grad
    moved = {name: before[name] - rows_of(tables, name) for name in tables.tables}
    assert not moved["frozen"].any()
    for name, rate in (("trained", 0.05), ("twice", 0.1)):  # the first step of Adam is as long as its rate
        torch.testing.assert_close(moved[name][[3, 7]], torch.full((2, DIM), rate), rtol=1e-4, atol=0)
        assert moved[name].any(1).nonzero().flatten().tolist() == [3, 7]
    assert [int(tables.tables[name]._optimizer_step) for name in ("trained", "twice", "frozen")] == [1, 1, 0]
    assert {table.in_flight for table in tables.tables.values()} == {0}


def test_what_is_off_is_neither_planned_nor_fetched(stage):
    one, two = Memory("one", "first"), Memory("two", "second")
    tables = stage(one, two)
    looked_up = tables.evaluate(ids(4), {"one": "off"})
    assert set(looked_up.working_sets) == {"second"}
    assert set(looked_up.beside) == {"two"}
    assert looked_up.controls == {"one": "off"}
    assert (one.asked, [control for _, control in two.asked]) == ([], [None])
    everything = tables.evaluate(ids(4), {})
    assert (set(everything.working_sets), everything.controls) == ({"first", "second"}, {})


def test_a_control_is_handed_to_the_plan_of_its_kind_alone(stage):
    tables = stage(Memory("one", "first"), Memory("two", "second"))
    looked_up = tables.evaluate(ids(4), {"one": "next"})
    assert torch.equal(looked_up.working_sets["first"].lookup(0), rows_of(tables, "first")[5:6])
    assert torch.equal(looked_up.working_sets["second"].lookup(0), rows_of(tables, "second")[4:5])
    assert looked_up.beside == {"one": ["one [4] next"], "two": ["two [4] None"]}


def test_an_evaluation_reads_the_last_commit_and_disturbs_no_step(stage):
    tables = stage(Memory("one", "table"))
    first, second = tables.begin(ids(1)), tables.begin(ids(1))
    train(tables, first)
    after = rows_of(tables, "table")
    read = tables.evaluate(ids(1, 6), {}).working_sets["table"]
    assert not read.rows.requires_grad
    assert torch.equal(read.lookup(0), after[[1, 6]])
    assert torch.equal(train(tables, second)["table"].rows.detach(), after[1:2])


def test_a_model_without_memories_has_no_tables(stage):
    tables = stage()
    step = tables.begin(ids(1))
    looked_up = tables.activate(step)
    tables.commit(step, 0.1)
    assert (looked_up.working_sets, looked_up.beside, looked_up.controls, tables.pieces()) == ({}, {}, {}, {})
    assert tables.evaluate(ids(1), {}).working_sets == {}


def test_rows_are_drawn_for_the_kinds_that_are_named(stage):
    tables = stage(Memory("one", "first"), Memory("two", "second"), initialise=False)
    assert not rows_of(tables, "first").any()
    tables.initialise({"two"})
    assert not rows_of(tables, "first").any()
    drawn = rows_of(tables, "second")
    assert drawn.any(1).all()
    tables.initialise()
    assert rows_of(tables, "first").any(1).all()
    assert torch.equal(rows_of(tables, "second"), drawn)


def test_updates_are_counted_after_a_load_where_rows_count_theirs(stage):
    blocks = BlockOptimizerConfig()
    tables = stage(
        Memory("bank", "bank", optimizer=blocks), Memory("engram", "engram"), Memory("no", "no", optimizer=None)
    )
    for _ in range(2):
        train(tables, tables.begin(ids(3, 7)))
    tables.tables["bank"].drain()
    counts = tables.tables["bank"].store["updates"]
    assert "updates" not in tables.tables["engram"].store.arrays
    counts.zero_()
    tables.count_updates()
    assert counts.flatten().nonzero().flatten().tolist() == [3, 7]
    assert counts[3].item() == 2


def test_checkpoints_hold_every_table(stage):
    tables = stage(Memory("one", "first", "second"), Memory("two", "third", optimizer=None))
    found = tables.pieces()
    assert set(found) == {"first", "second", "third"}
    assert set(found["third"]) == {"rows"}
    assert {"rows", "step"} < set(found["first"])


def test_what_is_begun_is_skipped_at_the_end(stage):
    tables = stage(Memory("one", "table"))
    tables.begin(ids(1))
    tables.begin(ids(2))
    tables.close()
    assert {table.in_flight for table in tables.tables.values()} == {0}
    assert not [thread for thread in threading.enumerate() if thread.name == "kmem-tables"]
    tables.close()  # again is nothing


def test_tables_beyond_the_memory_of_the_machine_are_refused_before_any_is_allocated(stage, monkeypatch):
    """Each alone would fit."""
    rows = ROWS * DIM * 4
    monkeypatch.setattr(stage_tables, "available_host_memory", lambda: 2 * 4 * rows)
    frozen = Memory("one", "first", "second", optimizer=None)
    stage(frozen)
    monkeypatch.setattr(stage_tables, "available_host_memory", lambda: rows * 2)
    with pytest.raises(UserError, match=r"^one\.store and two\.store: .*host memory.*store=mmap"):
        stage(Memory("one", "first", optimizer=None), Memory("two", "second", optimizer=None))


def test_mapped_tables_of_several_machines_need_a_folder_of_their_own(monkeypatch):
    """The run folder, where they lie by default, is shared."""

    def gathered(machines):
        def gather(everyone, mine):
            everyone[:] = [mine, *((machine, 0) for machine in machines)]

        monkeypatch.setattr(stage_tables.dist, "all_gather_object", gather)
        monkeypatch.setattr(stage_tables.dist, "get_world_size", lambda: 2)

    planned = [(SimpleNamespace(store="mmap"), SimpleNamespace(section="one", settings=TableConfig(store="mmap")))]
    gathered(["other"])
    with pytest.raises(UserError, match=r"^one\.folder: the run folder is shared by 2 machines"):
        stage_tables._check_machines(planned, 0.5)
    local = TableConfig(store="mmap", folder="/scratch")
    stage_tables._check_machines([(planned[0][0], SimpleNamespace(section="one", settings=local))], 0.5)
    gathered([])
    stage_tables._check_machines(planned, 0.5)


@pytest.mark.parametrize(
    ("rows", "folder", "message"),
    [
        (ROWS, "/proc/nowhere", r"^one\.folder: /proc/nowhere "),
        (10**13, None, r"^table first: .* GiB .*\bdisk\b.* GiB "),
    ],
    ids=["folder", "disk"],
)
def test_a_mapped_table_that_cannot_be_had_is_refused(stage, tmp_path, rows, folder, message):
    memory = Memory("one", "first")
    memory.tables[0].rows, memory.tables[0].folder = rows, Path(folder or tmp_path)
    with pytest.raises(UserError, match=message):
        stage(memory)
    assert not [thread for thread in threading.enumerate() if thread.name == "kmem-tables"]


def test_one_gradient_that_is_not_finite_is_enough(stage):
    tables = stage(Memory("one", "first", "second"))
    context = StepContext()
    assert context.finite()
    context.load([], tables.activate(tables.begin(ids(1, 2))))
    assert context.finite()
    context.working_sets["second"].lookup(0).sum().backward()
    assert context.finite()
    context.working_sets["first"].lookup(0).mul(torch.tensor([[1.0], [float("nan")]])).sum().backward()
    assert not context.finite()


def test_gradients_of_a_table_looked_up_in_the_forward_pass_count(stage):
    memory = Memory("one", "first")
    context = StepContext(memories=[memory])
    assert context.finite()
    memory.finite = lambda: False
    assert not context.finite()
