"""Train, export, import, train on: the imported run starts at the loss where the first one ended."""

import json
from pathlib import Path

import pytest
import yaml

from kmem.checkpoint.reader import CheckpointReader
from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from tests.distributed.training_case import small_config
from tests.train.trainer_case import trainer_case

TEXT = "\n".join(f"the {first} of a {second} reads the {first}" for first in "abcdefghij" for second in "klmnopqrst")


def held_out(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "evaluation"}


ENGRAM = {"layers": [0], "heads": 2, "rows_per_head": 61, "row_dim": 8}


@pytest.mark.parametrize(("engram", "model_type"), [(None, "glm4_moe"), (ENGRAM, "kmem")], ids=["plain", "engram"])
def test_training_goes_on_from_an_export(engram, model_type, ranks, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def prepared(name, **tokenizer):
        reading = Reading(documents="line")
        prepare(Preparation(inputs=[tmp_path / "text.txt"], out=tmp_path / name, reading=reading, **tokenizer))
        return {"sources": [{"path": str(tmp_path / name)}], "sequence_length": 16}

    common = {"tracking": {"wandb": "disabled"}, "folder": str(tmp_path / "runs"), "evaluation": {"sequences": 4}}
    tree = small_config(
        model__vocab_size=260, model__engram=engram, data=prepared("data", vocab_size=260), train__steps=4
    )
    assert ranks.run(1, trainer_case, {**tree, **common, "name": "first"})[0]["error"] is None
    choice = export(CheckpointReader(tmp_path / "runs" / "first"), tmp_path / "out", say=str)
    assert choice.architecture.model_type == model_type

    back = tmp_path / "runs" / "back"
    import_folder(tmp_path / "out", back, say=str)
    tree = yaml.safe_load((back / "config.yaml").read_text())
    tree |= {"data": prepared("again", tokenizer=back / "tokenizer"), **common}
    tree["train"] |= {"steps": 2, "schedule": {"kind": "constant"}}
    answer = ranks.run(1, trainer_case, tree)[0]
    assert answer["error"] is None
    assert (answer["started_at"], answer["steps"]) == (0, 2)
    assert held_out(back)[0] == pytest.approx(held_out(tmp_path / "runs" / "first")[4], abs=1e-5)

    (tmp_path / "text.txt").write_text(TEXT.upper())
    start = {"resume": str(back / "checkpoints" / "step-00000000")}
    tree |= {"data": prepared("other", vocab_size=260), "name": "other", "checkpoint": start}
    assert "tokenizer differs" in ranks.run(1, trainer_case, tree)[0]["error"]
