"""Where a run begins: with the weights of another run, or with all of it; and what is refused."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kmem.checkpoint.commit import COMMIT_FILE, Commit, Progress
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.store import CheckpointStore, step_folder
from kmem.config import CheckpointConfig, UserError, parse_config
from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.train.resume_point import ResumePoint, find_resume_point
from tests.distributed.training_case import small_config
from tests.train.trainer_case import trainer_case

TEXT = {"tokenizer": "letters", "fingerprint": "addressed text"}


def checkpoints(run, *steps, data=TEXT):
    """A run folder with the commit files of these steps."""
    for step in steps:
        folder = step_folder(run / "checkpoints", step)
        folder.mkdir(parents=True)
        Commit(Progress(step, 8 * step, 100, step, dict(data)), {}, {}, {}, {}).write(folder)
    return run


@pytest.fixture
def begin(alone, tmp_path):
    """begin(**checkpoint section) -> (what the run `own` begins with, its step, own or not); None for nothing."""

    def found(**section):
        store = CheckpointStore(tmp_path / "own" / "checkpoints")
        point = find_resume_point(CheckpointConfig(**section), store)
        if point is None:
            return None
        assert point.commit == Commit.read(point.folder)
        return point.folder.parent.parent.name, point.commit.progress.step, point.kind

    return found


def test_a_new_run_begins_with_nothing(begin):
    assert begin() is None
    assert begin(resume="never") is None


@pytest.mark.parametrize("folder", ["other", "other/checkpoints", "other/checkpoints/step-00000004"])
@pytest.mark.parametrize(("field", "kind"), [("resume", "resumed"), ("start", "weights")])
def test_a_run_without_checkpoints_begins_with_those_of_another(begin, tmp_path, field, kind, folder):
    checkpoints(tmp_path / "other", 2, 4)
    assert begin(**{field: str(tmp_path / folder)}) == ("other", 4, kind)
    earlier = step_folder(tmp_path / "other/checkpoints", 2)
    assert begin(**{field: str(earlier)}) == ("other", 2, kind)


@pytest.mark.parametrize("field", ["resume", "start"])
def test_its_own_newest_checkpoint_wins(begin, tmp_path, field):
    """A job that is started again with the same command goes on, also where it was told to begin with another run."""
    checkpoints(tmp_path / "other", 9)
    checkpoints(tmp_path / "own", 2, 4)
    assert begin() == ("own", 4, "own")
    assert begin(**{field: str(tmp_path / "other")}) == ("own", 4, "own")


def test_a_start_that_is_gone_is_not_asked_for_again_and_a_resume_is(begin, tmp_path):
    checkpoints(tmp_path / "own", 2)
    assert begin(start="/nowhere") == ("own", 2, "own")
    with pytest.raises(UserError, match=r"^/nowhere: no complete checkpoint"):
        begin(resume="/nowhere")


def test_a_step_of_its_own_is_gone_back_to(begin, tmp_path):
    own = checkpoints(tmp_path / "own", 2, 4)
    assert begin(resume=str(step_folder(own / "checkpoints", 2))) == ("own", 2, "own")
    assert begin(resume=str(own)) == ("own", 4, "own")
    # Also where the run began with the weights of another: `start` has had its effect.
    checkpoints(tmp_path / "other", 9)
    start = str(tmp_path / "other")
    assert begin(start=start, resume=str(step_folder(own / "checkpoints", 2))) == ("own", 2, "own")


def test_a_damaged_checkpoint_is_passed_over_and_not_when_all_are(begin, tmp_path):
    own = checkpoints(tmp_path / "own", 2, 4)
    (step_folder(own / "checkpoints", 4) / COMMIT_FILE).write_text("{}")
    assert begin() == ("own", 2, "own")
    (step_folder(own / "checkpoints", 2) / COMMIT_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"^{own}/checkpoints: .*\[2, 4\]"):
        begin()


def test_never_refuses_a_run_that_has_checkpoints(begin, tmp_path):
    own = checkpoints(tmp_path / "own", 2)
    checkpoints(tmp_path / "other", 9)
    for section in ({}, {"start": str(tmp_path / "other")}):
        with pytest.raises(CheckpointError, match=rf"^checkpoint\.resume: never, .*{own}/checkpoints"):
            begin(resume="never", **section)
    shutil.rmtree(own)
    assert begin(resume="never", start=str(tmp_path / "other")) == ("other", 9, "weights")


@pytest.mark.parametrize("folder", ["own", "own/checkpoints", "own/checkpoints/step-00000002", "other/../own"])
@pytest.mark.parametrize("steps", [(), (2,)], ids=["new", "trained"])
def test_a_run_does_not_start_with_itself(begin, tmp_path, folder, steps):
    checkpoints(tmp_path / "own", *steps)
    checkpoints(tmp_path / "other", 9)
    start = tmp_path / folder
    with pytest.raises(CheckpointError, match=rf"^checkpoint\.start: {re.escape(str(start))} .*another name"):
        begin(start=str(start))


@pytest.mark.parametrize("steps", [(), (2,)], ids=["new", "trained"])
def test_a_run_begins_with_one_other(begin, tmp_path, steps):
    checkpoints(tmp_path / "own", *steps)
    other, third = checkpoints(tmp_path / "other", 9), checkpoints(tmp_path / "third", 9)
    for start in (other, third):
        with pytest.raises(CheckpointError, match=rf"^checkpoint\.start: {start}, .*checkpoint\.resume: {other}: "):
            begin(start=str(start), resume=str(other))


@pytest.mark.parametrize(("field", "message"), [("resume", r"^{}: "), ("start", r"^checkpoint\.start: {}: ")])
def test_a_folder_without_checkpoints_is_refused(begin, tmp_path, field, message):
    (tmp_path / "empty").mkdir()
    for folder in ("/nowhere", str(tmp_path / "empty")):
        with pytest.raises(UserError, match=message.format(folder) + "no complete checkpoint"):
            begin(**{field: folder})


def text(**changes):
    return SimpleNamespace(
        **{
            "tokenizer_fingerprint": "letters",
            "fingerprint": "addressed text",
            "sequences_fingerprint": "text",
            **changes,
        }
    )


def point(tmp_path, kind, **data):
    run = checkpoints(tmp_path / "other", 2, data={**TEXT, **data})
    folder = step_folder(run / "checkpoints", 2)
    return run, ResumePoint(folder, Commit.read(folder), kind)


@pytest.mark.parametrize("kind", ["own", "resumed", "weights"])
def test_the_text_of_a_checkpoint_goes_on(tmp_path, kind):
    """Also where its sequences had no addresses yet, since a bank may be added."""
    _, found = point(tmp_path, kind)
    found.check(text(), parse_config(small_config()), {})
    _, plain = point(tmp_path / "plain", kind, fingerprint="text")
    plain.check(text(), parse_config(small_config()), {})
    folder = found.folder
    unknown = ResumePoint(folder, Commit(Progress(2, 16, 100, 2), {}, {}, {}, {}), kind)  # as an import writes
    unknown.check(text(), parse_config(small_config()), {})


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("own", "another name"), ("resumed", r"checkpoint\.resume"), ("weights", r"checkpoint\.start")],
)
def test_another_tokenizer_is_refused(tmp_path, kind, hint):
    run, found = point(tmp_path, kind)
    with pytest.raises(CheckpointError, match=rf"^data\.sources: .*--tokenizer {run / 'tokenizer'}, .*{hint}"):
        found.check(text(tokenizer_fingerprint="words"), parse_config(small_config()), {})


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("own", r"another name, .*checkpoint\.start: {}"), ("resumed", r"checkpoint\.start: {} .*checkpoint\.resume")],
)
def test_other_text_is_refused_where_its_history_goes_on(tmp_path, kind, remedy):
    run, found = point(tmp_path, kind, fingerprint="other text")
    with pytest.raises(CheckpointError, match=r"^data: fingerprint .*" + remedy.format(run)):
        found.check(text(), parse_config(small_config()), {})
    _, weights = point(tmp_path / "again", "weights", fingerprint="other text")
    weights.check(text(), parse_config(small_config()), {})


@pytest.fixture
def first(ranks, run_config):
    """The folder of a run of two steps."""
    tree, _ = run_config(name="first", train__steps=2)
    assert ranks.run(1, trainer_case, tree)[0]["error"] is None
    return Path(tree["folder"]) / "first"


def evaluations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "evaluation"]


def test_weights_alone_begin_a_run_of_its_own(ranks, run_config, first):
    """With other text, in an order of its own, a schedule from its beginning, and a new optimizer."""
    changes = {"data__seed": 7, "train__steps": 2, "train__schedule": {"warmup_steps": 2}, "train__init_seed": 5}
    started, _ = run_config(name="started", checkpoint__start=str(first), **changes)
    answer = ranks.run(1, trainer_case, started)[0]
    assert (answer["error"], answer["started_at"], answer["steps"]) == (None, 0, 2)
    folder = first.with_name("started")
    assert evaluations(folder)[0] == (0, evaluations(first)[-1][1])
    before, after = CheckpointReader(first), CheckpointReader(folder)
    assert (after.commit.progress.optimizer_steps, after.commit.progress.consumed_samples) == (2, 16)
    rates = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert next(record["lr"] for record in rates if record["kind"] == "step") < started["train"]["optimizer"]["lr"]
    assert not torch.equal(before.read("norm.weight"), after.read("norm.weight"))
    # Started again it goes on with its own, also when the other run is gone.
    shutil.rmtree(first)
    started["train"]["steps"] = 3
    answer = ranks.run(1, trainer_case, started)[0]
    assert (answer["error"], answer["started_at"]) == (None, 2)


@pytest.mark.full
def test_what_a_run_cannot_begin_with_is_refused_on_every_rank(ranks, run_config, first, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {number} is another one" for number in range(50)))
    other = tmp_path / "other"
    prepare(Preparation(inputs=[tmp_path / "texts.txt"], out=other, vocab_size=260, reading=Reading(documents="line")))
    other_data = {"sources": [{"path": str(other)}], "sequence_length": 32}
    for changes, message in [
        ({"checkpoint__start": "/nowhere"}, r"^checkpoint\.start: /nowhere: no complete checkpoint"),
        (
            {"checkpoint__start": str(first), "checkpoint__resume": str(first)},
            rf"^checkpoint\.start: {first}, .*checkpoint\.resume: {first}: ",
        ),
        (
            {"checkpoint__start": str(first), "name": "first"},
            rf"^checkpoint\.start: {first} .*another name",
        ),
        (
            {"checkpoint__start": str(first), "model__moe__top_k": 1},
            r"^model\.moe\.top_k: 1\b.*\b2\b.*checkpoint\.start\b",
        ),
        (
            {"checkpoint__resume": str(first), "model__moe__top_k": 1},
            r"^model\.moe\.top_k: 1\b.*\b2\b.*checkpoint\.resume\b",
        ),
        ({"name": "first", "model__moe__top_k": 1}, r"^model\.moe\.top_k: 1\b.*\b2\b.*another name"),
        (
            {"checkpoint__start": str(first), "data": other_data, "model__vocab_size": 260},
            rf"^data\.sources: .*tokenizer .*--tokenizer {first / 'tokenizer'}, .*checkpoint\.start\b",
        ),
        (
            {"checkpoint__resume": str(first), "data__seed": 7},
            rf"^data: fingerprint .*checkpoint\.start: {first} .*checkpoint\.resume\b",
        ),
        (
            {"name": "first", "data__seed": 7},
            rf"^data: fingerprint .*another name.*checkpoint\.start: {first}\b",
        ),
    ]:
        tree, _ = run_config(**{"name": "second", "train__steps": 4, **changes})
        answers = ranks.run(2, trainer_case, tree)
        assert len({answer["error"] for answer in answers}) == 1
        assert re.search(message, answers[0]["error"])
