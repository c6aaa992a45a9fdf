"""`train.minutes`: a run of chosen length is the run of that length, to the bit."""

from pathlib import Path

import pytest
import yaml

from kmem.checkpoint.commit import Commit, committed_steps, step_folder
from kmem.config import ConfigError, parse_config
from kmem.config.train import MEASURED_STEPS
from kmem.train.time_plan import PLANNED
from tests.train.test_trainer import checkpoints, curve, metrics
from tests.train.trainer_case import trainer_case

SCHEDULE = {"kind": "cosine", "warmup_steps": 10}


def timed(run_config, **changes):
    fields = {"train__steps": 100_000, "train__minutes": 0.03, "train__schedule": SCHEDULE, "checkpoint__every": 5}
    return run_config(**(fields | {"evaluation__every": 50} | changes))[0]


def stop_case(tree, after):
    """As `trainer_case`, interrupted after a step."""
    import os
    import signal

    from kmem.train.callback import Callback

    class Stop(Callback):
        def on_step(self, record):
            if record.step == after:
                os.kill(os.getpid(), signal.SIGTERM)

    return trainer_case(tree, [Stop()])


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_of_chosen_length_is_the_run_of_that_length(ranks, run_config, world):
    tree = timed(run_config, name="timed")
    answers = ranks.run(world, trainer_case, tree)
    assert {answer["error"] for answer in answers} == {None}
    (steps,) = {answer["steps"] for answer in answers}
    assert MEASURED_STEPS < steps < 100_000
    assert f"{steps} steps of about" in answers[0]["printed"]
    folder = Path(tree["folder"]) / "timed"
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == steps
    commit = Commit.read(step_folder(checkpoints(tree), steps))
    assert commit.config["train"]["steps"] == commit.progress.facts[PLANNED] == steps

    told = timed(run_config, name="told", train__minutes=None, train__steps=steps)
    ranks.run(world, trainer_case, told)
    assert curve(told) == curve(tree)
    assert [record.get("lr") for record in metrics(told)] == [record.get("lr") for record in metrics(tree)]
    again = ranks.run(world, trainer_case, tree)
    assert {(answer["started_at"], answer["steps"]) for answer in again} == {(steps, steps)}


def test_a_resumed_run_keeps_its_length(ranks, run_config):
    tree, after = timed(run_config, train__minutes=0.05), MEASURED_STEPS + 1  # a slow machine chooses no more
    (answer,) = ranks.run(1, stop_case, tree, after)
    chosen = Commit.read(step_folder(checkpoints(tree), after)).progress.facts[PLANNED]
    assert (answer["steps"], committed_steps(checkpoints(tree))[-1]) == (after, after)
    (answer,) = ranks.run(1, trainer_case, tree)
    assert (answer["started_at"], answer["steps"]) == (after, chosen)


def test_a_run_stopped_before_the_choice_chooses_later(ranks, run_config):
    tree = timed(run_config)
    ranks.run(1, stop_case, tree, 4)
    assert committed_steps(checkpoints(tree)) == [4]
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 4
    assert 4 + MEASURED_STEPS < answer["steps"] < 100_000


def test_no_more_steps_than_asked_for(ranks, run_config):
    tree = timed(run_config, train__steps=12, train__minutes=60)
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["steps"] == 12


def test_the_measured_steps_must_lie_in_the_warm_up(run_config):
    with pytest.raises(ConfigError, match=r"^train\.minutes\b.*\bwarmup_steps\b"):
        parse_config(timed(run_config, train__schedule={"kind": "cosine", "warmup_steps": 9}))
    parse_config(timed(run_config, train__schedule={"kind": "constant"}))
