"""What DeepSpeed is told, as it reads it."""

from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig

from kmem.config import parse_config
from kmem.parallel.mesh import Mesh
from kmem.parallel.pipeline import engine_config
from tests.distributed.training_case import small_config

BANK = {"children": 2, "levels": [1]}
CASES = [
    (precision, zero_stage, data, frozen)
    for precision, zero_stage, data, frozen in product(["fp32", "bf16"], [0, 1], [1, 4], [False, True])
    if (precision, zero_stage) != ("bf16", 0)  # refused by the configuration
]


def settings(precision, zero_stage, data, frozen, **changes):
    """(what DeepSpeed is told, what it reads in it)."""
    bank = {"model__bank": {**BANK, "anchor": "frozen"}, "data__addresses": {"tree": "none"}} if frozen else {}
    tree = small_config(train__precision=precision, parallel__zero_stage=zero_stage, **bank, **changes)
    told = engine_config(parse_config(tree), Mesh(0, 1, data, 1))
    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: data)
    with mock.patch.object(comm, "get_rank", return_value=0):  # without a rank it takes the world for one
        return told, DeepSpeedConfig(told, mpu=ranks)


@pytest.mark.parametrize(("precision", "zero_stage", "data", "frozen"), CASES)
def test_state_is_sharded_where_there_is_state_and_somebody_to_share_it(precision, zero_stage, data, frozen):
    told, read = settings(precision, zero_stage, data, frozen)
    if precision == "bf16":  # DeepSpeed's bf16 optimizer is always sharded
        assert read.zero_optimization_stage == 1
    else:
        assert read.zero_optimization_stage == int(zero_stage == 1 and data > 1 and not frozen)
    # kmem computes the norm; DeepSpeed's own would be computed for nothing.
    sharded = read.zero_optimization_stage == 1 and precision == "fp32"
    assert told["zero_optimization"].get("compute_grad_norm", True) is not sharded


@pytest.mark.parametrize(("precision", "zero_stage", "data", "frozen"), CASES)
def test_gradients_are_summed_in_fp32(precision, zero_stage, data, frozen):
    _, read = settings(precision, zero_stage, data, frozen)
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert not read.float16_config.enabled
    if precision == "bf16":
        assert read.grad_accum_dtype == "fp32"


@pytest.mark.parametrize(("precision", "zero_stage", "data", "frozen"), CASES)
def test_a_step_has_the_micro_batches_of_the_pipeline(precision, zero_stage, data, frozen):
    """And what is kmem's is off: clipping, a schedule, printing."""
    _, read = settings(precision, zero_stage, data, frozen)
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (8, 2)
    assert read.gradient_accumulation_steps == 8 // (2 * data)
    assert (read.gradient_clipping, read.scheduler_name, read.optimizer_name) == (0.0, None, None)
    assert not read.steps_per_print


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_are_recomputed_one_by_one_or_not_at_all(recompute):
    _, read = settings("fp32", 1, 4, False, train__recompute=recompute)
    assert read.pipeline["activation_checkpoint_interval"] == int(recompute != "none")
    assert read.pipeline["use_reentrant"] is False
