"""Which source the n-th training sequence comes from."""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 1 << 18
"""Longest period of a blend. Weights that need a longer one are rounded to multiples of 1/262144 of their sum. This
shifts a source's share by at most 4e-6, and the order is built in 0.2 s (one core of a 2-core Xeon)."""


class Blend:
    """A fixed, periodic order of sources by weight.

    The shares are fractions a_i/D with one denominator D. Source i occurs exactly a_i times in a period of D samples,
    and more than n*a_i/D - 1 and fewer than n*a_i/D + 1 times in the first n samples, for every n. The order depends on
    the weights alone: a longer run only reads further, and locating a sample takes the same time anywhere in a run.
    """

    def __init__(self, weights: Sequence[float]):
        """weights: positive; only their ratios matter. A weight that rounds to 0 still gets one place."""
        self.shares = _whole_shares(weights)
        """a_i, integers; their sum is the period D."""
        self.period = sum(self.shares)
        order = _quota_order(self.shares)
        self._source_D = np.array(order, dtype=np.int64)
        self._rank_D = np.empty(self.period, dtype=np.int64)
        for source, share in enumerate(self.shares):
            self._rank_D[self._source_D == source] = np.arange(share)
        self._shares = np.array(self.shares, dtype=np.int64)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and draw of each sample: sample n is the k-th sequence (from 0) taken from its source."""
        period, place = np.divmod(samples, self.period)
        source = self._source_D[place]
        return source, period * self._shares[source] + self._rank_D[place]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Smallest integers in the ratio of the weights as written (0.7 is 7/10), or the nearest ones that fit."""
    exact = [Fraction(str(float(weight))) for weight in weights]
    total = sum(exact)
    denominator = lcm(*((weight / total).denominator for weight in exact))
    if denominator <= MAX_PERIOD:
        return [int(weight / total * denominator) for weight in exact]
    # Largest remainders, so that the integers add up to the period.
    ideal = [weight / total * MAX_PERIOD for weight in exact]
    shares = [int(value) for value in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda source: (shares[source] - ideal[source], source))
    for source in by_remainder[: MAX_PERIOD - sum(shares)]:
        shares[source] += 1
    return [max(share, 1) for share in shares]


def _quota_order(shares: Sequence[int]) -> list[int]:
    """One period of the order, by earliest deadline.

    The count of a source with share a of D stays within 1 of its share if draw j (from 0) is taken in one of the slots
    floor(j*D/a) + 1 to ceil((j+1)*D/a), counted from 1. P-fair scheduling on one processor has the same windows
    (Baruah, Cohen, Plaxton and Varvel, 1996), and a schedule that meets every window exists. Since each draw fills one
    slot and windows begin at whole slots, earliest deadline first finds it.
    """
    period = sum(shares)
    released: list[tuple[int, int]] = []  # (deadline, source)
    waiting = [(1, source) for source in range(len(shares))]  # (first slot, source), already a heap
    taken = [0] * len(shares)
    order = []
    for slot in range(1, period + 1):
        while waiting and waiting[0][0] <= slot:
            _, source = heapq.heappop(waiting)
            heapq.heappush(released, (-(-(taken[source] + 1) * period // shares[source]), source))
        deadline, source = heapq.heappop(released)
        assert slot <= deadline
        order.append(source)
        taken[source] += 1
        if taken[source] < shares[source]:
            heapq.heappush(waiting, (taken[source] * period // shares[source] + 1, source))
    return order
