"""Runs of Weights & Biases, offline: what they hold is read back from wandb's own file."""

import struct
from types import SimpleNamespace

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from kmem.config import ConfigError, parse_config
from kmem.train.tracking import WandbTracking
from tests.run_config import small_config

WHOLE = 1
FIELDS = {"wandb": "offline", "project": "memories", "entity": "team", "group": "seeds", "tags": ["a", "b"]}


def records(folder):
    """The first records of a `.wandb` file, which is a log of LevelDB: (checksum, length, kind) and the record."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    raw, at = path.read_bytes(), 7
    while at + 7 <= len(raw):
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        if kind != WHOLE:
            return
        yield Record.FromString(raw[at + 7 : at + 7 + length])
        at += 7 + length


def test_a_run_has_its_identity_and_says_how_to_send_it(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = parse_config(small_config(tracking={**FIELDS, "notes": "why"}))
    tracking = WandbTracking()
    tracking.on_start(SimpleNamespace(config=config, tracking={}, folder=SimpleNamespace(path=tmp_path)))
    tracking.on_end("finished")
    tracking.close()
    run = next(record.run for record in records(tmp_path) if record.HasField("run"))
    assert (run.project, run.entity, run.run_group, list(run.tags), run.notes) == (
        "memories", "team", "seeds", ["a", "b"], "why",
    )  # fmt: skip
    assert (run.run_id, run.display_name) == (tracking.run_id, config.name)
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in capfd.readouterr().err


def test_tags_are_those_that_the_service_takes():
    with pytest.raises(ConfigError, match=r"^tracking\.tags\.1: "):
        parse_config(small_config(tracking={"tags": ["a", "b" * 65]}))
