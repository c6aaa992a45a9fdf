"""A part of the attacks, in every run of the tests; `python -m tests.faults` runs all of them as long as one likes."""

from itertools import islice

import pytest

from tests.faults.corruption import attacks


@pytest.mark.parametrize("number", [60, pytest.param(None, marks=pytest.mark.full)])
def test_no_damaged_file_ends_in_a_traceback_or_in_silence(tmp_path, number):
    bad = [attack for attack in islice(attacks(tmp_path, seed=0), number) if attack[2] in ("traceback", "silent")]
    assert not bad
