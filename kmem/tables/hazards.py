"""Decides which rows may be handed out before the steps in flight are committed.

Steps are numbered by `begin`. Between `begin` and `commit` (or a skip), a step is in flight: its gradients may still
change every row that any rank asked for in this step. We say that the step holds these rows. Exact mode hands a row to
step t only when all earlier steps that hold it are committed. The owner decides this, from the requests of **all**
ranks: even if the asker has not used the row itself, another rank's gradient may still change it.

Proof. All jobs of an owner run on one thread in one order. Suppose that row x is handed to step t before the commit of
an earlier step u, so u is in flight. If `begin(t)` hands x out, the busy count of x is zero at that time. u began
before t, so the rows of u are counted, and they stay counted until u ends. So u does not hold x, and the commit of u
does not change x. If x is handed out later than in `begin(t)`, no earlier step is in flight, which contradicts the
assumption. So x has the value that it has after the commits of all earlier steps: the value that it would have in a run
that begins t after them.

With staleness s, step t waits only for steps up to t - 1 - s: the newest s steps in flight are not counted yet.
"""

import numpy as np


class Hazards:
    """Busy counts of an owner's rows.

    Args:
        busy: [rows] uint8, initially zero: how many counted steps in flight hold each row.
        staleness: how many of the latest earlier steps a row need not wait for.
    """

    def __init__(self, busy: np.ndarray, staleness: int = 0) -> None:
        self.busy, self.staleness = busy, staleness
        self.in_flight: dict[int, np.ndarray] = {}
        """Step between begin and commit -> local rows that any rank asked for in it, unique; their gradients will come
        back."""
        self.counted: set[int] = set()
        """Steps in flight whose rows are included in the busy counts."""

    def begin(self, step: int, wanted: np.ndarray, owned: np.ndarray) -> np.ndarray:
        """Begin a step. Returns bool [W], True for the wanted rows that may be handed out now.

        Args:
            wanted: int64 [W], local rows that the askers want, in the order of `Request.wanted`.
            owned: the same rows, unique.
        """
        for number, others in self.in_flight.items():
            if number < step - self.staleness and number not in self.counted:
                self.busy[others] += 1
                self.counted.add(number)
        self.in_flight[step] = owned
        return self.busy[wanted] == 0

    def end(self, step: int) -> None:
        """End a step that has been committed or skipped."""
        owned = self.in_flight.pop(step)
        if step in self.counted:
            self.busy[owned] -= 1
            self.counted.remove(step)

    def waits(self, step: int) -> bool:
        """Whether an earlier step for which this one must wait is in flight. The same on all ranks."""
        return any(number < step - self.staleness for number in self.in_flight)
