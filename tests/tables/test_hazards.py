"""Which rows may be handed out, against a model that remembers every step in flight."""

import random

import numpy as np
import pytest

from kmem.tables.hazards import Hazards

ROWS = 12


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_a_row_is_free_when_no_step_that_counts_holds_it(seed, staleness):
    """Steps begin in order and end in any; those of other ranks are among `owned`, and rows are wanted repeatedly."""
    draw = random.Random(seed)
    busy = np.zeros(ROWS, np.uint8)
    hazards = Hazards(busy, staleness)
    held: dict[int, set[int]] = {}
    begun = refused = 0
    while begun < 150:
        if held and draw.random() < (0.3 if len(held) < 6 else 0.9):
            ended = draw.choice(sorted(held))
            hazards.end(ended)
            del held[ended]
        else:
            wanted = draw.choices(range(ROWS), k=draw.randint(0, 8))
            before = [rows for number, rows in held.items() if number < begun - staleness]
            fresh = hazards.begin(begun, np.array(wanted, np.int64), np.unique(np.array(wanted, np.int64)))
            assert fresh.tolist() == [not any(row in rows for rows in before) for row in wanted]
            refused += int((~fresh).sum())
            held[begun] = set(wanted)
            begun += 1
        for step in range(begun + 3):
            assert hazards.waits(step) == any(number < step - staleness for number in held)
    assert refused > 50
    for step in sorted(held):
        hazards.end(step)
    assert not busy.any()
    assert not hazards.in_flight


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_row_waits_for_the_step_that_is_older_than_the_staleness(staleness):
    hazards, row = Hazards(np.zeros(1, np.uint8), staleness), np.zeros(1, np.int64)
    free = [bool(hazards.begin(step, row, row)[0]) for step in range(5)]
    assert free == [step <= staleness for step in range(5)]
    assert [hazards.waits(step) for step in range(5)] == [not fresh for fresh in free]


def test_as_many_steps_as_a_table_lets_begin_may_hold_one_row():
    """255, the running one and a depth of at most 254: the count of 254 earlier ones fits its byte."""
    busy, row = np.zeros(3, np.uint8), np.array([1])
    hazards = Hazards(busy)
    for step in range(255):
        assert bool(hazards.begin(step, row, row)[0]) == (step == 0)
    assert busy.tolist() == [0, 254, 0]
    none = np.zeros(0, np.int64)
    for step in range(255):
        assert not hazards.begin(1000 + step, row, none)[0]
        hazards.end(1000 + step)
        hazards.end(step)
    assert hazards.begin(2000, row, row)[0]
    assert busy.tolist() == [0, 0, 0]


def test_a_step_that_no_later_one_counted_leaves_the_count_alone():
    busy, rows = np.zeros(2, np.uint8), np.array([0, 1])
    hazards = Hazards(busy)
    hazards.begin(0, rows, rows)
    hazards.end(0)
    assert busy.tolist() == [0, 0]
    assert hazards.begin(1, rows, rows).all()
