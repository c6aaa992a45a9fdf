"""Whole runs: metrics, exact resume, errors before anything is lost."""

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmem.checkpoint.commit import COMMIT_FILE, committed_steps, step_folder
from kmem.train.interruption import Interruption
from tests.train.trainer_case import trainer_case


def metrics(tree, kind="step"):
    path = Path(tree["folder"]) / tree["name"] / "metrics.jsonl"
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == kind]


def curve(tree):
    return {record["step"]: (record["loss"], record["grad_norm"], record["tokens"]) for record in metrics(tree)}


def checkpoints(tree):
    return Path(tree["folder"]) / tree["name"] / "checkpoints"


def test_a_run_learns_and_reports(ranks, run_config):
    tree, _ = run_config(train__steps=30, evaluation__every=10)
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["error"] is None
    assert answer["steps"] == 30
    steps, evaluations = metrics(tree), metrics(tree, "evaluation")
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["step"] for record in evaluations] == [0, 10, 20, 30]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"] - 1
    assert evaluations[0]["bits_per_byte"] == pytest.approx(evaluations[0]["loss"] / 0.6931, rel=0.02), "1 byte a token"
    last = steps[-1]
    assert last["consumed_samples"] == 30 * 8
    assert last["tokens_per_second"] > 0
    assert last["model_flops"] > 0
    assert set(last["experts"]) == {"1", "2", "3"}, "the dense layer 0 has no load"
    for load in last["experts"].values():
        assert load["load_max_over_mean"] >= 1
        assert 0 < load["load_entropy"] <= 1
        assert load["dropped"] == 0
    assert {"data", "forward", "backward", "optimizer"} <= set(last["phases"])
    assert re.search(r"held out .*\bstep 30\b", answer["printed"])
    run = Path(tree["folder"]) / tree["name"]
    assert (run / "config.yaml").is_file()
    assert (run / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("world", [1, 4])
def test_resume_is_bit_identical(ranks, run_config, tmp_path, world):
    """Six steps at once, or three, a stop, and three more."""
    mesh = {"parallel__pipeline": 2, "parallel__expert": 2} if world == 4 else {}
    whole, _ = run_config(name="whole", **mesh)
    ranks.run(world, trainer_case, whole)
    halves, _ = run_config(name="halves", checkpoint__every=3, train__steps=3, **mesh)
    ranks.run(world, trainer_case, halves)
    halves["train"]["steps"] = 6
    answers = ranks.run(world, trainer_case, halves)
    assert [answer["started_at"] for answer in answers] == [3] * world
    # The schedule is a constant here: a cosine would depend on the number of steps.
    assert curve(halves) == curve(whole)
    assert metrics(halves, "evaluation")[-1]["loss"] == metrics(whole, "evaluation")[-1]["loss"]


def test_resume_on_another_mesh(ranks, run_config):
    tree, _ = run_config(train__steps=3, checkpoint__every=3)
    ranks.run(4, trainer_case, {**tree, "parallel": {"pipeline": 2, "expert": 2}})
    tree["train"]["steps"] = 6
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 3
    whole, _ = run_config(name="whole")
    ranks.run(1, trainer_case, whole)
    for step, figures in curve(tree).items():
        assert figures == pytest.approx(curve(whole)[step], abs=1e-4)


def test_metrics_of_repeated_steps_are_replaced(ranks, run_config):
    """A run that was killed after step 5 goes on from the checkpoint of step 4: no step is listed twice."""
    tree, _ = run_config()
    ranks.run(1, trainer_case, tree)
    shutil.rmtree(step_folder(checkpoints(tree), 6))
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 4
    assert [record["step"] for record in metrics(tree)] == [1, 2, 3, 4, 5, 6]


def test_another_batch_size_goes_on_with_the_next_sample(ranks, run_config):
    tree, _ = run_config(train__steps=2)
    ranks.run(1, trainer_case, tree)
    tree["train"] |= {"steps": 4, "global_batch_size": 4}
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["error"] is None
    assert [record["consumed_samples"] for record in metrics(tree)] == [8, 16, 20, 24]


def test_non_finite_step_stops_all_ranks_before_weights_change(ranks, run_config):
    tree, _ = run_config(checkpoint__every=1, train__steps=50)
    tree["train"]["optimizer"] = {"lr": 1e30, "clip_norm": None}
    answers = ranks.run(2, trainer_case, tree)
    errors = {answer["error"] for answer in answers}
    assert len(errors) == 1, errors
    (error,) = errors
    assert error.startswith("step ")
    assert "not finite" in error
    failed = int(error.split(":")[0].removeprefix("step "))
    assert committed_steps(checkpoints(tree))[-1] == failed - 1, "the last good step is saved and valid"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_is_not_finite_is_not_saved(ranks, run_config, asynchronous):
    tree, _ = run_config(checkpoint={"every": 1, "asynchronous": asynchronous}, train__steps=2)
    ranks.run(2, trainer_case, tree)
    tree["train"] |= {"steps": 3, "optimizer": {"lr": 1e39, "clip_norm": None}}
    errors = {answer["error"] for answer in ranks.run(2, trainer_case, tree)}
    assert len(errors) == 1, errors
    assert re.search(r"step-00000003 was not saved: rank \d: weight/\S+: .*\bnot finite\b", errors.pop())
    assert committed_steps(checkpoints(tree)) == [1, 2]
    tree["train"]["optimizer"] = {"lr": 1e-3}
    assert {answer["started_at"] for answer in ranks.run(2, trainer_case, tree)} == {2}


def failing_observers_case(tree):
    """A console without a reader, a metrics file on a full disk, and a callback with a bug."""
    from kmem.train.callback import Callback
    from kmem.train.reporting import MetricsFile, ProgressReport

    class Broken(Callback):
        def on_step(self, record):
            raise ZeroDivisionError

        def state(self):
            raise KeyError

        on_end = close = on_step

    def refuse(*_):
        raise BrokenPipeError

    def full(*_):
        raise OSError(28, "No space left on device")

    ProgressReport._say, say = refuse, ProgressReport._say
    MetricsFile.on_step, on_step = full, MetricsFile.on_step
    try:
        return trainer_case(tree, [Broken()])
    finally:
        ProgressReport._say, MetricsFile.on_step = say, on_step


def test_observers_that_fail_are_reported_once_and_spoil_nothing(ranks, run_config):
    tree, _ = run_config(name="observed")
    for rank, answer in enumerate(ranks.run(2, failing_observers_case, tree)):
        assert (answer["error"], answer["steps"]) == (None, 6)
        for observer in ("ProgressReport", "MetricsFile", "Broken"):
            assert answer["logged"].count(f"{observer} failed") == (rank == 0)
    assert committed_steps(checkpoints(tree)) == [4, 6]


def test_half_a_line_of_metrics_is_never_left(run_config, tmp_path, monkeypatch):
    from kmem.train.reporting import MetricsFile

    observer, record = MetricsFile(), SimpleNamespace(to_json=lambda: {"step": 1, "loss": 2.0})
    observer.path = tmp_path / "metrics.jsonl"
    observer.on_step(record)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
    try:
        with pytest.raises(OSError, match="metrics"):
            observer.on_step(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert observer.path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_damaged_lines_of_metrics_do_not_keep_a_run_from_going_on(ranks, run_config):
    tree, _ = run_config(train__steps=4)
    ranks.run(1, trainer_case, tree)
    path = Path(tree["folder"]) / tree["name"] / "metrics.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(lines[0].replace(b"loss", b"l\xffss", 1) + b"[3]\n" + b"".join(lines[1:]))
    tree["train"]["steps"] = 5
    (answer,) = ranks.run(1, trainer_case, tree)
    assert (answer["error"], answer["steps"]) == (None, 5)
    assert "metrics.jsonl: 2 lines not readable" in answer["logged"]
    assert path.read_bytes().splitlines(True)[: len(lines) - 1] == lines[1:]


def test_a_signal_after_the_save_changes_nothing():
    interruption, before = Interruption(), signal.getsignal(signal.SIGINT)
    interruption.listen()
    try:
        interruption.saved = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            interruption._since = -1e9
    finally:
        interruption.close()
    assert interruption.received is None
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "half commit"])
def test_damaged_newest_checkpoint_is_reported_and_passed_over(ranks, run_config, damage):
    tree, _ = run_config()
    ranks.run(2, trainer_case, tree)
    assert committed_steps(checkpoints(tree)) == [4, 6], "keep_last is 2"
    newest = step_folder(checkpoints(tree), 6)
    data = next(newest.glob("part-*.safetensors"))
    content = bytearray(data.read_bytes())
    if damage == "truncated":
        data.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-1] ^= 1
        data.write_bytes(content)
    else:
        commit = newest / COMMIT_FILE
        commit.write_text(commit.read_text()[:500])
    answers = ranks.run(2, trainer_case, tree)
    assert [answer["started_at"] for answer in answers] == [4, 4]
    assert str(newest) in answers[0]["logged"]
    # Its place is taken by the step trained anew, from which a third start goes on.
    answers = ranks.run(2, trainer_case, tree)
    assert [answer["started_at"] for answer in answers] == [6, 6]


def test_no_undamaged_checkpoint_is_an_error_and_no_fresh_start(ranks, run_config):
    tree, _ = run_config(train__steps=2)
    ranks.run(1, trainer_case, tree)
    (step_folder(checkpoints(tree), 2) / COMMIT_FILE).write_text("{}")
    (answer,) = ranks.run(1, trainer_case, tree)
    assert re.match(rf"{checkpoints(tree)}: .*\[2\]", answer["error"])
    assert len(metrics(tree)) == 2


def test_going_back_gives_up_the_later_checkpoints(ranks, run_config):
    """From step 2 with another rate: the new trajectory is saved, and the old one is not resumed any more."""
    tree, _ = run_config(checkpoint={"every": 2, "keep_last": 5})
    ranks.run(1, trainer_case, tree)
    old = {step: (step_folder(checkpoints(tree), step) / COMMIT_FILE).read_text() for step in (2, 4, 6)}
    tree["checkpoint"]["resume"] = str(step_folder(checkpoints(tree), 2))
    tree["train"]["optimizer"]["lr"] = 0.001
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 2
    new = {step: (step_folder(checkpoints(tree), step) / COMMIT_FILE).read_text() for step in (2, 4, 6)}
    assert [new[step] == old[step] for step in (2, 4, 6)] == [True, False, False]
    assert len(list(checkpoints(tree).glob("*.set-aside-*"))) == 2


def test_purging_never_deletes_what_was_just_saved(ranks, run_config):
    tree, _ = run_config(checkpoint={"every": 2, "keep_last": 1})
    ranks.run(1, trainer_case, tree)
    (step_folder(checkpoints(tree), 6) / COMMIT_FILE).unlink()  # an unfinished deletion, a newer step
    tree["train"]["steps"] = 3
    ranks.run(1, trainer_case, tree)
    assert committed_steps(checkpoints(tree)) == [3]
    assert [entry.name for entry in checkpoints(tree).iterdir()] == ["step-00000003"], "leftovers are cleaned up"


def test_a_run_does_not_write_into_its_data(ranks, run_config, corpus):
    tree, _ = run_config(folder=str(corpus.parent), name=corpus.name)
    before = {path.name for path in corpus.iterdir()}
    for answer in ranks.run(2, trainer_case, tree):
        assert re.search(r"^folder: .*prepared data\b", answer["error"])
    assert {path.name for path in corpus.iterdir()} == before


def test_purging_does_not_follow_links(ranks, run_config, tmp_path):
    tree, _ = run_config(train__steps=2, checkpoint={"every": 2, "keep_last": 1})
    ranks.run(1, trainer_case, tree)
    kept, linked = tmp_path / "kept", step_folder(checkpoints(tree), 2)
    shutil.move(linked, kept)
    linked.symlink_to(kept)
    unfinished = step_folder(checkpoints(tree), 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    unfinished.symlink_to(tmp_path / "other")
    tree["train"]["steps"] = 6
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 2
    assert committed_steps(checkpoints(tree)) == [2, 6]
    assert (kept / COMMIT_FILE).is_file()
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_unfinished_save_is_never_picked(ranks, run_config):
    """What a killed save leaves: a folder of another name, or one without its commit file."""
    tree, _ = run_config(train__steps=4)
    ranks.run(1, trainer_case, tree)
    folder = step_folder(checkpoints(tree), 4)
    shutil.copytree(folder, folder.with_name("step-00000009.partial"))
    shutil.copytree(folder, step_folder(checkpoints(tree), 8), ignore=shutil.ignore_patterns(COMMIT_FILE))
    tree["train"]["steps"] = 5
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 4


def test_retention(ranks, run_config):
    tree, _ = run_config(train__steps=9, checkpoint={"every": 1, "keep_last": 2, "keep_every": 4})
    ranks.run(1, trainer_case, tree)
    assert committed_steps(checkpoints(tree)) == [4, 8, 9]


def test_no_space_left_is_one_clear_error_and_earlier_checkpoints_stay(ranks, run_config):
    tree, _ = run_config(train__steps=2)
    ranks.run(1, trainer_case, tree)
    tree["train"]["steps"] = 4
    answers = ranks.run(2, full_disk_case, tree)
    assert len({answer["error"] for answer in answers}) == 1
    assert "no space left" in answers[0]["error"]
    assert "step-00000004" in answers[0]["error"]
    assert committed_steps(checkpoints(tree)) == [2]
    (answer,) = ranks.run(1, trainer_case, tree)
    assert answer["started_at"] == 2


def full_disk_case(tree):
    """No file of this process may grow beyond 64 KiB, which fails the write as a full disk does."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        return trainer_case(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__moe__top_k": 1}, r"^model\.moe\.top_k: 1\b.*\b2\b"),
        ({"data__seed": 7}, "^data: fingerprint "),
        ({"checkpoint__resume": "never"}, r"^checkpoint\.resume: never, .*checkpoints"),
        ({"checkpoint__resume": "/nowhere"}, "^/nowhere: no complete checkpoint"),
        ({"data__sources": [{"path": "/nowhere"}]}, "/nowhere: .*kmem data prepare"),
        ({"model__vocab_size": 100}, r"^model\.vocab_size: 100\b.*\b257\b"),
        ({"train__global_batch_size": 6}, r"^train\.global_batch_size: 6\b.*\b4\b"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(ranks, run_config, change, message):
    tree, _ = run_config(train__steps=2)
    ranks.run(2, trainer_case, tree)
    tree, _ = run_config(train__steps=4, **change)
    answers = ranks.run(2, trainer_case, tree)
    for answer in answers:
        assert re.search(message, answer["error"])


def test_resume_from_another_run(ranks, run_config):
    first, _ = run_config(name="first", train__steps=2)
    ranks.run(1, trainer_case, first)
    second, _ = run_config(name="second", checkpoint__resume=str(Path(first["folder"]) / "first"))
    (answer,) = ranks.run(1, trainer_case, second)
    assert (answer["started_at"], answer["steps"]) == (2, 6)
    second["train"]["steps"] = 7
    (answer,) = ranks.run(1, trainer_case, second)
    assert answer["started_at"] == 6, "a job started again goes on with its own checkpoints"


def test_another_schedule_takes_effect_from_the_next_step(ranks, run_config):
    tree, _ = run_config(train__steps=2)
    ranks.run(1, trainer_case, tree)
    tree["train"] |= {"steps": 4, "schedule": {"kind": "wsd", "decay_steps": 2, "min_ratio": 0.0}}
    ranks.run(1, trainer_case, tree)
    rates = [record["lr"] for record in metrics(tree)]
    peak = tree["train"]["optimizer"]["lr"]
    assert rates == pytest.approx([peak, peak, peak / 2, 0.0])


def test_a_folder_that_cannot_be_written_is_one_error_on_every_rank(ranks, run_config):
    tree, _ = run_config(folder="/dev/null/runs", checkpoint__resume="never")
    for answer in ranks.run(2, trainer_case, tree):
        assert answer["error"].startswith("folder: /dev/null/runs/case cannot be written")


def test_a_failed_save_in_the_background_stops_all_ranks(ranks, run_config):
    tree, _ = run_config(train__steps=50, checkpoint={"every": 2, "asynchronous": True})
    answers = ranks.run(2, full_disk_case, tree)
    assert len({answer["error"] for answer in answers}) == 1
    assert "no space left" in answers[0]["error"]
    assert "saving" in answers[0]["printed"]
    assert "saved" not in answers[0]["printed"]


def test_background_saves_are_complete_at_the_end(ranks, run_config):
    tree, _ = run_config(checkpoint={"every": 2, "asynchronous": True})
    ranks.run(2, trainer_case, tree)
    assert committed_steps(checkpoints(tree)) == [4, 6]


def test_held_out_loss_does_not_depend_on_the_mesh(ranks, run_config):
    """Also when the held-out sequences do not fill the last micro-batches."""
    losses = []
    for name, world, changes in (("one", 1, {}), ("wide", 4, {"parallel__pipeline": 2, "train__micro_batch_size": 4})):
        tree, _ = run_config(name=name, train__steps=1, evaluation={"sequences": None}, **changes)
        ranks.run(world, trainer_case, tree)
        losses.append([(record["loss"], record["tokens"]) for record in metrics(tree, "evaluation")])
    for (a, n), (b, m) in zip(*losses, strict=True):
        assert n == m
        assert a == pytest.approx(b, abs=1e-5)


def test_schedules():
    from kmem.config import TrainConfig
    from kmem.train.schedule import learning_rate

    def rates(**schedule):
        train = TrainConfig.model_validate(
            {
                "steps": 100,
                "global_batch_size": 1,
                "micro_batch_size": 1,
                "optimizer": {"lr": 1.0},
                "schedule": schedule,
            }
        )
        return torch.tensor([learning_rate(train, step) for step in range(100)])

    cosine = rates(kind="cosine", warmup_steps=10, min_ratio=0.1)
    assert cosine[:10].diff().allclose(torch.tensor(1 / 11))
    assert cosine.argmax() == 10
    assert cosine[-1] == pytest.approx(0.1)
    assert (cosine[10:].diff() <= 0).all()
    wsd = rates(kind="wsd", decay_steps=20, min_ratio=0.0)
    assert (wsd[:80] == 1).all()
    assert wsd[80:].diff().allclose(torch.tensor(-0.05))
    assert wsd[-1] == 0
    step = rates(kind="step", step_at=(0.5, 0.9), step_factor=0.1)
    assert step[[0, 49, 50, 89, 90]].tolist() == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert (rates(kind="constant") == 1).all()
