"""Runs of Weights & Biases, offline: what they hold is read back from wandb's own file."""

import struct
import time
from types import SimpleNamespace

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from kmem.config import ConfigError, parse_config
from kmem.train.tracking import WandbTracking
from tests.run_config import small_config

BLOCK, FIRST, LAST = 1 << 15, (1, 2), (1, 4)
FIELDS = {"wandb": "offline", "project": "memories", "entity": "team", "group": "seeds", "tags": ["a", "b"]}


def records(folder):
    """The records of a `.wandb` file, a log of LevelDB: blocks of parts, each with checksum, length and kind."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    raw, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:  # no part begins so late in a block
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        record = (b"" if kind in FIRST else record) + raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in LAST:
            yield Record.FromString(record)


def test_a_run_has_its_identity_and_says_how_to_send_it(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = parse_config(small_config(tracking={**FIELDS, "notes": "why"}))
    tracking = WandbTracking()
    tracking.on_start(SimpleNamespace(config=config, tracking={}, folder=SimpleNamespace(path=tmp_path)))
    tracking.on_end("finished")
    tracking.close()
    until, found = time.monotonic() + 30, []
    while not found and time.monotonic() < until:  # wandb writes in a process of its own, which may end later
        found = [record.run for record in records(tmp_path) if record.HasField("run")]
    (run,) = found
    assert (run.project, run.entity, run.run_group, list(run.tags), run.notes) == (
        "memories", "team", "seeds", ["a", "b"], "why",
    )  # fmt: skip
    assert (run.run_id, run.display_name) == (tracking.run_id, config.name)
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in capfd.readouterr().err


def test_tags_are_those_that_the_service_takes():
    with pytest.raises(ConfigError, match=r"^tracking\.tags\.1: "):
        parse_config(small_config(tracking={"tags": ["a", "b" * 65]}))
