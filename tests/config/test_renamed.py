"""Keys that once had another name: an error in a user's configuration, read in files that kmem has saved."""

import json

import pytest
import yaml

from kmem.cli import main
from kmem.config import Config, ConfigError, load_config, parse_config
from kmem.config.problems import sections_in
from kmem.config.renamed import RENAMED, saved_config
from tests.distributed.training_case import small_config

OLD_KEYS = [
    ("memory", {"store": "mmap"}, "memory: is now called engram"),
    ("model.memory_bank", {"levels": [2]}, "model.memory_bank: is now called model.bank"),
    ("model.memory_bank", None, "model.memory_bank: is now called model.bank"),
    (
        "evaluation.bank_controls",
        ["generic", "none"],
        "evaluation.bank_controls: is now called evaluation.controls; "
        'write evaluation.controls=["bank=generic", "bank=none"]',
    ),
    (
        "train.activation_checkpointing",
        True,
        'train.activation_checkpointing: is now called train.recompute; write train.recompute="full"',
    ),
    ("evaluation.bank_controls", [], "evaluation.bank_controls: is now called evaluation.controls"),
]


@pytest.mark.parametrize(("key", "value", "message"), OLD_KEYS)
def test_an_old_key_is_an_error_that_names_the_new_one(tmp_path, capsys, key, value, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_config(**{key.replace(".", "__"): value})))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == message
    path.write_text(yaml.safe_dump(small_config()))
    assert main(["train", "--config", str(path), "--set", f"{key}={json.dumps(value)}", "--dry-run"]) == 2
    assert capsys.readouterr().err.strip() == f"kmem train: error: {message}"


def test_the_table_names_keys_that_there_are():
    for old, new in RENAMED.items():
        *parents, key = old.split(".")
        section = Config
        for parent in parents:
            (section,) = sections_in(section.model_fields[parent].annotation)
        assert new.key in section.model_fields
        assert key not in section.model_fields


def test_a_saved_configuration_has_the_names_of_today():
    old = {
        "name": "memory",
        "memory": {"store": "mmap"},
        "model": {"memory_bank": {"levels": [2]}, "moe": {"memory_bank": 1}},
        "evaluation": {"bank_controls": ["generic", "none"]},
        "data": {"sources": [{"path": "memory"}]},
        "train": {"activation_checkpointing": False},
    }
    assert saved_config(old) == {
        "name": "memory",
        "engram": {"store": "mmap"},
        "model": {"bank": {"levels": [2]}, "moe": {"memory_bank": 1}},
        "evaluation": {"controls": ["bank=generic", "bank=none"]},
        "data": {"sources": [{"path": "memory"}]},
        "train": {"recompute": "none"},
    }
    assert saved_config(saved_config(old)) == saved_config(old)
    both = {"memory": {"store": "mmap"}, "engram": {"store": "host"}}
    assert saved_config(both) == both


@pytest.mark.parametrize("file", ["config.yaml", "model.yaml"])
def test_files_of_a_run_folder_are_read_under_old_names(tmp_path, file):
    tree = small_config(memory={"threads": 3}, model__memory_bank=None)
    run = tmp_path / "runs" / "old"
    run.mkdir(parents=True)
    (run / file).write_text(yaml.safe_dump(tree))
    (tmp_path / "mine.yaml").write_text(f"include: {run / file}\nname: mine\n")
    with pytest.raises(ConfigError, match="memory: is now called engram"):
        load_config(tmp_path / "mine.yaml")
    (run / "checkpoints").mkdir()
    expected = parse_config(small_config(engram={"threads": 3}))
    assert load_config(run / file) == expected
    assert load_config(tmp_path / "mine.yaml") == expected.model_copy(update={"name": "mine"})
    with pytest.raises(ConfigError, match="memory: is now called engram"):
        load_config(run / file, ["memory.threads=2"])
