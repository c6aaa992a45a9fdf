"""Train, export, import, train on: the imported run starts at the loss where the first one ended."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, GenerationConfig

from kmem.checkpoint.reader import CheckpointReader
from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from tests.distributed.training_case import small_config
from tests.hf.models import NATIVE, write_run
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


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "llama, scaled rotary frequencies"])
def test_older_readers_find_their_names_in_config_json(name, tmp_path):
    """Transformers 4 reads these alone; the present one reads both and finds the same."""
    export(write_run(tmp_path / "run", NATIVE[name]), tmp_path / "out", say=str)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = fields["rope_parameters"]
    assert fields["rope_theta"] == rope["rope_theta"]
    assert fields["torch_dtype"] == fields["dtype"]
    assert (fields["rope_scaling"] or {}).get("factor") == rope.get("factor")
    assert fields.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    assert name != "qwen3_moe" or fields["num_experts"] == fields["num_local_experts"] == 8
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.rope_parameters == rope
    older = {
        key: value for key, value in fields.items() if key not in ("rope_parameters", "num_local_experts", "dtype")
    }
    assert AutoConfig.for_model(**older).rope_parameters == rope


def test_generation_settings_survive_import_and_export(tmp_path):
    export(write_run(tmp_path / "run", NATIVE["llama"]), tmp_path / "out", say=str)
    chosen = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7, 9]}
    path = tmp_path / "out" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **chosen}))
    import_folder(tmp_path / "out", tmp_path / "again", say=str)
    export(CheckpointReader(tmp_path / "again"), tmp_path / "second", say=str)
    generation = GenerationConfig.from_pretrained(tmp_path / "second")
    assert {name: getattr(generation, name) for name in chosen} == chosen
