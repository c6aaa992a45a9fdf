"""Which rows may be handed out before the steps in flight are committed.

Steps are numbered by `begin`. Between `begin` and `commit` (or a skip) a step is in flight, and its gradients may still
change every row that any rank asked for it. Exact mode hands a row to step t only when all earlier steps that hold it
are committed. The owner decides this, against what **all** ranks asked of it: a row that the asker has not used itself
may yet be changed by another rank's gradient.

Proof. All jobs of an owner run on one thread in one order. Let row x be handed to step t before the commit of an
earlier step u, so u is in flight. If it is handed out by `begin(t)`, its busy count is zero then; u has been begun
before, so its rows have been counted, and they are discounted only when u ends. So u does not hold x, and the commit
of u does not change it. If it is handed out later, no earlier step is in flight, against the assumption. So x has
the value that it has after the commits of all earlier steps: that of a run which begins t after them.

With staleness s, step t waits only for steps up to t - 1 - s: the newest s in flight are not counted yet.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class InFlight:
    """A step between begin and commit, at an owner."""

    owned: np.ndarray
    """Local rows that any rank asked for it, unique: their gradients will come back."""
    counted: bool = False
    """Its rows are in the busy count."""


class Hazards:
    """Busy counts of an owner's rows.

    Args:
        busy: [rows] uint8, zero: how many counted steps in flight hold a row.
        staleness: steps whose missing commits a row need not wait for.
    """

    def __init__(self, busy: np.ndarray, staleness: int = 0) -> None:
        self.busy, self.staleness = busy, staleness
        self.in_flight: dict[int, InFlight] = {}

    def begin(self, step: int, wanted: np.ndarray, owned: np.ndarray) -> np.ndarray:
        """A step starts; True for the wanted rows [W] that may be handed out now."""
        for number, other in self.in_flight.items():
            if number < step - self.staleness and not other.counted:
                self.busy[other.owned] += 1
                other.counted = True
        self.in_flight[step] = InFlight(owned)
        return self.busy[wanted] == 0

    def end(self, step: int) -> None:
        """A step has been committed or skipped."""
        ended = self.in_flight.pop(step)
        if ended.counted:
            self.busy[ended.owned] -= 1

    def waits(self, step: int) -> bool:
        """True while a step that this one must wait for is in flight. The same on all ranks."""
        return any(number < step - self.staleness for number in self.in_flight)
