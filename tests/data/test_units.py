import numpy as np
import pytest

from kmem.config import UserError
from kmem.data.order import offsets_of
from kmem.data.units import Unit, UnitMap

LENGTHS = np.array([1, 4, 5, 9, 10, 14, 15, 16, 31, 100])
STARTS = offsets_of(LENGTHS)[:-1]


def test_windows_tile_their_documents():
    units = UnitMap(STARTS, LENGTHS, Unit(10))
    by_document = [units.lengths[units.documents == document].tolist() for document in range(len(LENGTHS))]
    assert by_document == [[1], [4], [5], [9], [10], [14], [10, 5], [10, 6], [10, 10, 11], [10] * 10]
    assert len(units) == sum(map(len, by_document))
    assert np.array_equal(units.starts, offsets_of(units.lengths)[:-1])
    assert units.first.tolist() == np.cumsum([0, *map(len, by_document)]).tolist()
    places = np.arange(LENGTHS.sum())
    documents = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert np.array_equal(units.of(documents, places), np.repeat(np.arange(len(units)), units.lengths))
    assert np.array_equal(units.continued(), np.append(units.documents[:-1] == units.documents[1:], False))


def test_a_document_is_one_unit():
    units = UnitMap(STARTS, LENGTHS, Unit.parse("document"))
    assert np.array_equal(units.lengths, LENGTHS)
    assert np.array_equal(units.of(np.array([3, 9]), STARTS[[3, 9]] + 5), [3, 9])
    assert not units.continued().any()


def test_units_are_read_as_they_are_written():
    for text in ("document", "window:2048"):
        assert str(Unit.parse(text)) == text
    for wrong in ("window", "window:", "window:0", "window:-3", "window:1.5", "line", ""):
        with pytest.raises(UserError, match=f"--unit {wrong}: .*window:N"):
            Unit.parse(wrong)
