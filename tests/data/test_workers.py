import os
import time

import pytest

from kmem.config import UserError
from kmem.data.workers import Workers


def slow_square(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number * number


def refuse(number: int) -> int:
    if number == 3:
        raise UserError("number 3 is refused")
    return number


def die(number: int) -> int:
    os._exit(7)


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_items(count):
    with Workers(count) as workers:
        assert list(workers.in_order(slow_square, range(20))) == [number * number for number in range(20)]


def test_items_are_read_only_a_little_ahead():
    taken = []
    with Workers(2) as workers:
        results = workers.in_order(slow_square, (taken.append(number) or number for number in range(1000)))
        next(results)
        assert len(taken) <= 6


def test_an_error_in_a_worker_arrives_here():
    with pytest.raises(UserError, match="number 3"), Workers(2) as workers:
        list(workers.in_order(refuse, range(10)))


def test_a_dead_worker_is_an_error():
    with pytest.raises(UserError, match=r"worker .*--workers"), Workers(2) as workers:
        list(workers.in_order(die, range(10)))
