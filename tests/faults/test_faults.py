"""A part of the attacks, in every run of the tests; `python -m tests.faults` runs all of them as long as one likes."""

from functools import partial
from itertools import islice

import pytest

from tests.faults import configurations, corruption, ranks, writing
from tests.faults.outcomes import BAD

full = partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("attacks", "number"),
    [
        (corruption.attacks, 60),
        full(corruption.attacks, None),
        (partial(writing.attacks, quick=True), 2),
        full(writing.attacks, 45),
        full(ranks.disagreements, 20),
        full(ranks.beside, 100),
        full(configurations.configurations, 300),
    ],
)
def test_no_attack_ends_in_a_traceback_or_in_silence(tmp_path, attacks, number):
    assert not [attack for attack in islice(attacks(tmp_path, 0), number) if attack[2] in BAD]
