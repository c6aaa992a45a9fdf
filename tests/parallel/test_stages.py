"""The division of layers over stages, against all divisions."""

import random
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest

from kmem.parallel import stages


@pytest.mark.parametrize("tied", [False, True])
def test_the_heaviest_stage_is_as_light_as_it_can_be(monkeypatch, tied):
    draw = random.Random(int(tied))
    for _ in range(60):
        layers = [draw.choice([1, 10, draw.randint(1, 100)]) for _ in range(draw.randint(1, 6))]
        head = draw.randint(1, 300)
        monkeypatch.setattr(
            stages, "count_parameters", lambda shape, n=layers, h=head: SimpleNamespace(layers=n, head=h)
        )
        weights = [0, *layers, *([0] if tied else []), head]  # a tied model's norm is a layer of its own
        for count in range(1, len(weights) + 1):
            config = SimpleNamespace(
                model=SimpleNamespace(shape=None, tie_embeddings=tied), parallel=SimpleNamespace(pipeline=count)
            )
            bounds = stages.stage_bounds(config)
            assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), count + 1)
            assert all(start < stop for start, stop in pairwise(bounds))
            cuts = combinations(range(1, len(weights)), count - 1)
            best = min(heaviest(weights, [0, *inner, len(weights)]) for inner in cuts)
            assert heaviest(weights, bounds) == best


def heaviest(weights, bounds):
    return max(sum(weights[start:stop]) for start, stop in pairwise(bounds))
