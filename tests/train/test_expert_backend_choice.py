"""Training with another expert backend: the same curve, and one message on every rank where it does not run."""

import re
import sys

import pytest
import torch

from kmem.config import parse_config
from kmem.parallel import pipeline
from kmem.parallel.pipeline import expert_problem
from tests.distributed.training_case import small_config, train_case
from tests.train.trainer_case import trainer_case


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"train__precision": "bf16"}, marks=pytest.mark.full)], ids=["fp32", "bf16"]
)
def test_the_loop_trains_as_grouped_mm(ranks, changes):
    (reference,) = ranks.run(1, train_case, small_config(**changes), 5)
    expert = {"parallel__expert": 2, "train__expert_backend": "loop"}
    tolerance = 0.02 if changes else 1e-6
    for world, mesh in ((1, {"train__expert_backend": "loop"}), (2, expert)):
        result = ranks.run(world, train_case, small_config(**mesh, **changes), 5)[0]
        assert result["losses"] == pytest.approx(reference["losses"], abs=tolerance)
        assert result["counts"] == reference["counts"] or changes


def test_a_gpu_without_kernels_is_refused(monkeypatch):
    """Not trained on without them in silence."""
    monkeypatch.setattr(pipeline, "local_device", lambda: torch.device("cuda"))
    config = parse_config(small_config())
    assert expert_problem(config) is None
    monkeypatch.setitem(sys.modules, "kmem_kernels.permute.op", None)
    refusal = expert_problem(config)
    assert re.match(r"model\.moe: .*kernels .*kmem_kernels\.permute\.op", refusal)
    assert refusal.endswith("pip install 'triton>=3.6'")


def test_a_backend_that_does_not_run_here_is_refused_on_every_rank(ranks, run_config):
    tree, _ = run_config(train__expert_backend="deepspeed")
    answers = ranks.run(2, trainer_case, tree)
    (error,) = {answer["error"] for answer in answers}
    assert re.match(r"train\.expert_backend=deepspeed: .*\bgrouped_mm\b", error)
    assert all(answer["steps"] is None for answer in answers)
