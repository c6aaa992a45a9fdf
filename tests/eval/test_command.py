"""`kmem eval` and tracking."""

import json
from pathlib import Path

import pytest
import torch

from kmem.cli import main
from kmem.config import ModelConfig
from kmem.model.engram_reader import EngramAddresses
from tests.train.test_trainer import metrics
from tests.train.trainer_case import trainer_case


def test_eval_equals_the_evaluation_of_the_run(ranks, run_config, capsys, corpus, monkeypatch):
    tree, _ = run_config(train__steps=2, evaluation={"sequences": None})
    ranks.run(2, trainer_case, tree)
    run = Path(tree["folder"]) / tree["name"]
    assert main(["eval", "--checkpoint", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["held_out"][str(corpus)]
    last = metrics(tree, "evaluation")[-1]
    assert figures["loss"] == pytest.approx(last["loss"], abs=1e-5)
    assert figures["tokens"] == last["tokens"]
    assert figures["bits_per_byte"] == pytest.approx(last["bits_per_byte"], abs=1e-5)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["eval", "--checkpoint", str(run), "--sequences", "3"]) == 0
    subject, _, heading, *table = capsys.readouterr().out.splitlines()
    assert subject.startswith(f"held-out loss of {run}"), "in one piece, however long"
    assert [column.strip() for column in heading[1:-1].split("┃")][1:] == [
        "bits per byte",
        "loss",
        "perplexity",
        "tokens",
    ]
    assert all(len(line) <= 60 for line in table)
    assert "".join(line.split("│")[1].strip() for line in table if line.startswith("│")) == str(corpus)


ENGRAM = {"layers": [1], "heads": 2, "rows_per_head": 101, "row_dim": 8, "boundary": "document"}


CONTROLS = ("off", "shuffled", "single-row")


def test_controls_of_engram(ranks, run_config, capsys, corpus):
    """With memory on the loss is that of the run; without, or with the rows of others, it is worse once rows count."""
    memory = {"optimizer": {"lr_multiplier": 20.0}}
    evaluation = {"sequences": None, "controls": [f"engram={control}" for control in CONTROLS]}
    tree, _ = run_config(train__steps=4, evaluation=evaluation, model__engram=ENGRAM, engram=memory)
    assert ranks.run(2, trainer_case, tree)[0]["error"] is None
    run = str(Path(tree["folder"]) / tree["name"])
    losses = {}
    for control in ("on", "off", "shuffled", "single-row"):
        assert main(["eval", "--checkpoint", run, "--json", "--control", f"engram={control}"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["memories"] == {"engram": control}
        losses[control] = printed["held_out"][str(corpus)]["loss"]
    trained = metrics(tree, "evaluation")[-1]
    assert losses["on"] == pytest.approx(trained["loss"], abs=1e-5)
    for control in CONTROLS:
        assert losses[control] == pytest.approx(trained["controls"][f"engram={control}"]["loss"], abs=1e-5)
    assert losses["on"] < min(losses["off"], losses["shuffled"], losses["single-row"]) - 0.05
    assert len(set(losses.values())) == 4
    assert main(["eval", "--checkpoint", run, "--control", "engram=shuffled", "--sequences", "2"]) == 0
    assert "engram shuffled" in " ".join(capsys.readouterr().out.split())
    assert main(["eval", "--checkpoint", run, "--json", "--controls", "all"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = {name: figures[str(corpus)]["loss"] for name, figures in printed["controls"].items()}
    assert found == {f"engram={control}": losses[control] for control in CONTROLS}
    assert main(["eval", "--checkpoint", run, "--controls", "all", "--sequences", "2"]) == 0
    assert all(f"engram={control}" in capsys.readouterr().out for control in CONTROLS[:1])


def test_shuffled_rows_are_other_rows_of_the_same_head():
    addresses = EngramAddresses.build(tiny_model().shape, eos_token_id=0)
    addressing = addresses.addressing
    rows = torch.arange(addressing.rows(0)).view(1, -1, 1).expand(-1, -1, addressing.total_heads)
    sizes, offsets = torch.tensor(addressing.sizes[0]), torch.tensor(addressing.offsets(0))
    rows = (rows % sizes + offsets).contiguous()
    shuffled, single = (addresses.other_rows(addresses.layers[0], way)(rows) for way in ("shuffled", "single-row"))
    assert torch.equal(single, offsets.expand_as(rows))
    for head, (size, offset) in enumerate(zip(addressing.sizes[0], addressing.offsets(0), strict=True)):
        pairs = set(zip(rows[0, :, head].tolist(), shuffled[0, :, head].tolist(), strict=True))
        assert {row for row, _ in pairs} == {other for _, other in pairs} == set(range(offset, offset + size))
        assert len(pairs) == size
        assert not any(row == other for row, other in pairs)


def tiny_model():
    attention = {"kind": "gqa", "num_heads": 2}
    engram = {**ENGRAM, "compression": False}
    return ModelConfig.model_validate(
        {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "intermediate_size": 16, "attention": attention}
        | {"engram": engram}
    )


def test_a_model_without_memory_has_no_controls(ranks, run_config, capsys):
    tree, _ = run_config(train__steps=1)
    ranks.run(1, trainer_case, tree)
    run = str(Path(tree["folder"]) / tree["name"])
    for control in ("engram=off", "bank=none", "engrams=off", "engram"):
        assert main(["eval", "--checkpoint", run, "--control", control]) == 2
        assert f"--control {control}" in capsys.readouterr().err


def test_eval_names_what_is_missing(capsys, tmp_path):
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert f"{tmp_path}: no complete checkpoint" in capsys.readouterr().err


def test_wandb_run_goes_on_under_its_id(ranks, run_config):
    """Offline: the id of the first part is remembered by the checkpoint and used by the second."""
    tree, _ = run_config(train__steps=2, tracking={"wandb": "offline"})
    (first,) = ranks.run(1, tracked_case, tree)
    tree["train"]["steps"] = 4
    (second,) = ranks.run(1, tracked_case, tree)
    assert first["wandb_run_id"] == second["wandb_run_id"]
    runs = list((Path(tree["folder"]) / tree["name"] / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(first["wandb_run_id"] in folder.name for folder in runs)


def tracked_case(tree):
    """A run with Weights & Biases in offline mode; the identity its checkpoint remembers."""
    import os

    from kmem.config import parse_config
    from kmem.data.reader import open_data
    from kmem.parallel.joining import join_mesh
    from kmem.train.tracking import WandbTracking
    from kmem.train.trainer import Trainer

    os.environ.pop("WANDB_MODE", None)
    config = parse_config(tree)
    data = open_data(config.data, config.model.vocab_size)
    trainer = Trainer(config, join_mesh(config), data, [WandbTracking()])
    trainer.fit()
    return trainer.tracking
