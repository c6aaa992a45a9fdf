"""Which rows of a larger table a table has."""

import torch

from kmem.tables.sharding import RowSelection

SELECTION = RowSelection(20, (range(2, 5), range(7, 8), range(12, 20)))
NUMBERS = [2, 3, 4, 7, 12, 13, 14, 15, 16, 17, 18, 19]


def test_rows_lie_in_the_order_of_their_numbers():
    assert len(SELECTION) == len(NUMBERS)
    assert SELECTION.places(torch.tensor(NUMBERS)).tolist() == list(range(len(NUMBERS)))
    assert SELECTION.places(torch.zeros(0, dtype=torch.int64)).tolist() == []


def test_a_cut_is_made_of_pieces_of_consecutive_numbers():
    for start in range(len(NUMBERS) + 1):
        for stop in range(start, len(NUMBERS) + 1):
            pieces = list(SELECTION.cut(start, stop))
            assert [number for _, rows in pieces for number in rows] == NUMBERS[start:stop]
            assert [start + before for before, _ in pieces] == [NUMBERS.index(rows.start) for _, rows in pieces]
            assert all(len(rows) for _, rows in pieces)
