"""`kmem bench plan` at a size that says nothing about speed."""

import json

import pytest

from kmem.cli import main

TINY = ["model.hidden_size=64", "model.num_layers=2", "model.vocab_size=512", "train.micro_batch_size=2"]


@pytest.mark.full
def test_a_step_is_compared_with_its_prediction(tmp_path, capsys):
    record = tmp_path / "plan.json"
    words = ["bench", "plan", "--rounds", "1", "--steps", "1", "--json", str(record)]
    assert main([*words, "--set", *TINY, "train.global_batch_size=2"]) == 0
    found = json.loads(record.read_text())
    assert found["ratio"] == pytest.approx(found["predicted"] / found["measured"])
    assert sum(found["parts"].values()) == pytest.approx(found["predicted"])
    printed = capsys.readouterr().out
    assert "GFLOP/s in products" in printed
    assert "goal: within 25%" in printed


@pytest.mark.parametrize("change", ["parallel.pipeline=2", "train.precision=bf16"])
def test_only_one_rank_in_fp32_is_predicted(change, capsys):
    assert main(["bench", "plan", "--set", change]) == 2
    assert "needs one rank (parallel.pipeline=1, parallel.expert=1) and fp32" in capsys.readouterr().err
