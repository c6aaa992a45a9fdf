"""Checkpoints, run folders and exports whose configuration has the names of before: they load and go on as they are."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from kmem.checkpoint.commit import COMMIT_FILE, Commit, _digest
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from tests.clustering.cluster_case import give_addresses
from tests.hf.banks import make_tree
from tests.train.trainer_case import trainer_case


@pytest.fixture
def run(ranks, run_config, corpus, tmp_path):
    """run(**dotted changes) trains a model with n-gram memory and a bank."""
    folder, tree = tmp_path / "prepared", make_tree(tmp_path / "the-tree", 2, 2, of_tokenizer=corpus / "tokenizer")
    shutil.copytree(corpus, folder)
    give_addresses(folder, tree)

    def make(**changes):
        configured, _ = run_config(
            **{
                "model__bank": {"children": 2, "levels": [4, 1]},
                "model__engram": {"layers": [1], "heads": 2, "rows_per_head": 50, "row_dim": 8, "preset": "qwen"},
                "data": {"sources": [{"path": str(folder)}], "sequence_length": 32, "addresses": {"tree": str(tree)}},
                "engram__prefetch_depth": 2,
                "evaluation": {"every": None, "sequences": 6, "at_start": False},
                **changes,
            }
        )
        (answer,) = ranks.run(1, trainer_case, configured)
        assert answer["error"] is None
        return answer

    return make


def with_old_names(tree):
    """A configuration as it was saved."""
    model = {**tree["model"]}
    evaluation = {**tree["evaluation"]}
    model["memory_bank"] = model.pop("bank")
    evaluation["bank_controls"] = evaluation.pop("controls")
    others = {name: value for name, value in tree.items() if name not in ("engram", "model", "evaluation")}
    return {**others, "memory": tree["engram"], "model": model, "evaluation": evaluation}


def rename_run(folder):
    """Give a run folder and its checkpoints the old names."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(with_old_names(yaml.safe_load(config.read_text()))))
    for step in (folder / "checkpoints").iterdir():
        commit = Commit.read(step)
        replace(commit, config=with_old_names(commit.config)).write(step)
        body = json.loads((step / COMMIT_FILE).read_text())
        assert "memory_bank" in body["config"]["model"]
        manifests, origin = body.pop("manifests"), body["progress"].pop("memories")["bank"]
        body |= {"addressing": manifests["engram"], "tree": manifests["bank"]}
        body["progress"] |= {"bank_seed": origin["seed"], "bank_start": origin.get("start")}
        body["digest"] = _digest(body)
        (step / COMMIT_FILE).write_text(json.dumps(body))
        assert Commit.read(step) == commit


def printed(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_checkpoint_goes_on_and_is_used_as_before(run, tmp_path, capsys):
    run(name="whole", train__steps=4)
    run(name="half", train__steps=2)
    half = tmp_path / "runs" / "half"
    words = [
        ("eval", "--checkpoint", half, "--json"),
        ("generate", "--checkpoint", half, "--prompt", "the state", "--max-new-tokens", "4"),
    ]
    before = [printed(capsys, *found) for found in words]
    rename_run(half)
    assert [printed(capsys, *found) for found in words] == before
    CheckpointReader(half).verify()

    out, back = tmp_path / "out", tmp_path / "back"
    printed(capsys, "export", "--checkpoint", half, "--out", out)
    described = json.loads((out / "config.json").read_text())
    words = [("generate", "--checkpoint", out, "--prompt", "the state", "--max-new-tokens", "4")]
    before = [printed(capsys, *found) for found in words]
    described["model"]["memory_bank"] = described["model"].pop("bank")
    (out / "config.json").write_text(json.dumps(described))
    (out / "digests.json").unlink()  # exports of that time have none
    assert [printed(capsys, *found) for found in words] == before
    printed(capsys, "import", "--from", out, "--out", back)
    half_reader, back_reader = CheckpointReader(half), CheckpointReader(back)
    assert back_reader.config.model == half_reader.config.model
    assert all(torch.equal(back_reader.read(name), half_reader.read(name)) for name in half_reader.tensors)

    # Its own folder, and the file in it.
    assert main(["train", "--config", str(half / "config.yaml"), "--dry-run"]) == 0
    assert run(name="half", train__steps=4)["started_at"] == 2
    one, other = (CheckpointReader(tmp_path / "runs" / name) for name in ("whole", "half"))
    assert one.commit.tensors.keys() == other.commit.tensors.keys()
    for key, stored in one.commit.tensors.items():
        assert torch.equal(one.read_stored(key, 0, stored.size), other.read_stored(key, 0, stored.size)), key
    assert "memory_bank" not in (half / "config.yaml").read_text()


def test_another_run_begins_with_it(run, tmp_path):
    run(name="old", train__steps=2)
    old = tmp_path / "runs" / "old"
    rename_run(old)
    assert run(name="resumed", train__steps=3, checkpoint__resume=str(old))["started_at"] == 2
    assert run(name="started", train__steps=1, checkpoint__start=str(old))["started_at"] == 0
    answers = {name: Path(tmp_path / "runs" / name / "config.yaml").read_text() for name in ("resumed", "started")}
    assert all("memory_bank" not in text for text in answers.values())
