"""Where a run begins: with the weights of another run, or with all of it; and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from tests.train.trainer_case import trainer_case


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
