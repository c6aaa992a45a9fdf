"""Training with another expert backend: the same curve, and one message on every rank where it does not run."""

import pytest

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


def test_a_backend_that_does_not_run_here_is_refused_on_every_rank(ranks, run_config):
    tree, _ = run_config(train__expert_backend="deepspeed")
    answers = ranks.run(2, trainer_case, tree)
    (error,) = {answer["error"] for answer in answers}
    assert error.startswith("train.expert_backend=deepspeed: ")
    assert error.endswith("; or choose grouped_mm, which runs everywhere")
    assert all(answer["steps"] is None for answer in answers)
