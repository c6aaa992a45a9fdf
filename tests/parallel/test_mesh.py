"""Places of ranks on the mesh, and the samples that each of them reads."""

from collections import Counter
from itertools import product

import pytest

from kmem.config import ConfigError, UserError
from kmem.parallel.mesh import raise_on_all_ranks, run_on_all_ranks
from kmem.parallel.pipeline import split_samples
from tests.parallel.meshes import SHAPES, ranks_of


@pytest.mark.parametrize("shape", SHAPES)
def test_stages_are_outermost_and_expert_groups_are_neighbours(shape):
    pipeline, data, expert = shape
    places = [(mesh.stage, mesh.data_rank) for mesh in ranks_of(*shape)]
    assert places == list(product(range(pipeline), range(data)))
    assert {mesh.world for mesh in ranks_of(*shape)} == {pipeline * data}
    groups = [mesh.rank - mesh.expert_rank for mesh in ranks_of(*shape)]
    assert groups == [rank // expert * expert for rank in range(pipeline * data)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_copy_of_everything_counts(shape):
    """Of a stage's replicated state, and of each of its slices of experts."""
    pipeline, _, expert = shape
    meshes = ranks_of(*shape)
    firsts = [mesh.stage for mesh in meshes if mesh.is_first_replica]
    slices = [(mesh.stage, mesh.expert_rank) for mesh in meshes if mesh.is_first_expert_replica]
    assert firsts == list(range(pipeline))
    assert slices == list(product(range(pipeline), range(expert)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ranks_of_a_stage_share_a_steps_samples(shape):
    pipeline, data, _ = shape
    first, micro_batch, number = 1000, 3, 2
    global_batch = number * micro_batch * data
    found = Counter()
    for mesh in ranks_of(*shape):
        mine = split_samples(first, global_batch, micro_batch, mesh)
        assert [len(samples) for samples in mine] == [micro_batch] * number
        found.update((mesh.stage, sample) for samples in mine for sample in samples)
    assert found == Counter(product(range(pipeline), range(first, first + global_batch)))


@pytest.mark.parametrize("shape", SHAPES)
def test_micro_batches_are_those_of_one_rank_dealt_in_turn(shape):
    """So what a micro-batch computes does not depend on the mesh."""
    (alone,) = ranks_of(1, 1, 1)
    whole = split_samples(48, 48, 2, alone)
    assert whole == [[first, first + 1] for first in range(48, 96, 2)]
    for mesh in ranks_of(*shape):
        assert split_samples(48, 48, 2, mesh) == whole[mesh.data_rank :: mesh.data]


def test_a_problem_of_a_rank_is_raised_as_the_users_error(alone):
    raise_on_all_ranks(None)
    with pytest.raises(ConfigError, match=r"^the problem$"):
        raise_on_all_ranks("the problem", ConfigError)
    assert run_on_all_ranks(lambda: 7) == 7

    def failing(error):
        raise error

    with pytest.raises(UserError, match=r"^field: wrong$"):
        run_on_all_ranks(lambda: failing(ConfigError("field: wrong")))
    with pytest.raises(ZeroDivisionError):  # a bug stays one
        run_on_all_ranks(lambda: failing(ZeroDivisionError()))
