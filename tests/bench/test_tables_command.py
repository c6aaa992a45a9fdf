"""`kmem bench tables` at sizes that say nothing about speed."""

import json
from collections import Counter

import pytest
import torch

from kmem.bench import contest
from kmem.bench.contest import Contestant
from kmem.bench.tables import DRAWS, sized, step_batches, tables, write_all
from kmem.bench.tables_command import figures
from kmem.cli import main
from kmem.config import RowOptimizerConfig, load_config, parse_config
from kmem.data.prepare import Preparation, prepare
from kmem.data.reader import open_data
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.worker import TableWorker
from tests.tables.toy import opened
from tests.warm_processes import WITH_KMEM, WarmContext

TINY = [
    "model.hidden_size=32",
    "model.num_layers=4",
    "model.vocab_size=64",
    "model.attention.num_heads=2",
    "model.moe.intermediate_size=32",
    "model.engram.row_dim=8",
    "data.sequence_length=16",
]


@pytest.mark.parametrize("optimizer", ["lazy_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("size", [1 << 26, 1 << 33])
def test_rows_and_state_have_the_size_asked_for(optimizer, size):
    """Up to what rounding rows to primes takes."""
    config = load_config("bench/tables", [f"engram.optimizer.name={optimizer}"])
    found = parse_config(sized(config, size, store="mmap"))
    assert found.engram.store == "mmap"
    assert sum(table.bytes for table in tables(found)) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("kind", DRAWS)
def test_tokens_of_a_step_are_its_own(kind):
    config = load_config("bench/tables")
    first, again, other = (DRAWS[kind](config, step) for step in (3, 3, 4))
    assert first.shape == (config.train.global_batch_size, config.data.sequence_length + 1)
    assert first.equal(again)
    assert not first.equal(other)


def test_zipf_tokens_repeat_as_words_do():
    config = load_config("bench/tables")
    counts = Counter(DRAWS["zipf"](config, 0).flatten().tolist())
    assert counts[0] > 1.5 * counts[1] > 0
    assert len(counts) < 0.6 * len(set(DRAWS["uniform"](config, 0).flatten().tolist()))


def test_text_is_that_of_training(tmp_path):
    """Step after step of the prepared corpora's sequences, in their order of training."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number"}) + "\n" for n in range(200)))
    prepare(Preparation(inputs=[tmp_path / "texts.jsonl"], out=tmp_path / "data", vocab_size=257))
    sources = f"data.sources=[{{path: {tmp_path / 'data'}}}]"
    config = load_config("bench/tables", [sources, "data.sequence_length=32", "train.micro_batch_size=4"])
    reader = open_data(config.data, config.model.vocab_size).training
    for step, batches in zip(range(3), step_batches(config, "text"), strict=False):
        expected = reader.read(range(8 * step, 8 * step + 8))
        assert torch.cat([batch.input_ids for batch in batches]).equal(expected.input_ids)
        assert len(batches) == 2


def test_a_written_table_is_as_new_and_leaves_no_file(tmp_path):
    worker = TableWorker()
    spec = TableSpec("table", 100, 8, store="mmap", folder=tmp_path)
    with opened(Table(spec, RowOptimizerConfig(name="adam_catchup"), worker)) as table:
        before = {name: array.clone() for name, array in table.store.arrays.items()}
        write_all(table)
        assert all(table.store[name].equal(array) for name, array in before.items())
        assert not list(tmp_path.iterdir())
    worker.close()


def test_slower_is_a_ratio_of_rounds_taken_in_turn():
    config = parse_config(sized(load_config("bench/tables"), 1 << 20, store="host"))
    quick, slow = (Contestant(name, lambda: None, ()) for name in ("quick", "slow"))
    for number, seconds in enumerate((1.0, 2.0, 4.0)):  # a machine that becomes slower
        for contestant, factor in ((quick, 1), (slow, 1 + 0.02 * number)):
            measured = {name: [1.0, 2.0, 9.0] for name in ("stall_ms", "fetch_ms", "owner_ms", "unique_rows", "bytes")}
            contestant.rounds.append({"seconds": factor * seconds, **measured})
    found = figures(tables(config), slow, quick, 2)
    assert found["slower"] == pytest.approx([0, 0.02, 0.04])
    assert (found["median_slower"], found["goal"], found["met"]) == (pytest.approx(0.02), 0.05, True)
    assert (found["stall_ms"], found["longest_stall_ms"], found["step_ms"]) == (2.0, 9.0, pytest.approx(1020))
    assert "slower" not in figures(tables(config), quick, quick, 2)


@pytest.mark.parametrize("start", ["forked", pytest.param("executed", marks=pytest.mark.full)])
def test_small_and_mapped_tables_are_measured_in_turn(tmp_path, capsys, monkeypatch, start):
    if start == "forked":
        monkeypatch.setattr(contest, "get_context", lambda method: WarmContext(WITH_KMEM))
    record = tmp_path / "memory.json"
    sizes = ["--small-mib", "0.1", "--gib", "0", "--mapped-gib", "0.001", "--folder", str(tmp_path / "mapped")]
    rounds = ["--rounds", "2", "--steps", "2", "--warmup", "1", "--threads", "1", "--json", str(record)]
    assert main(["bench", "tables", "--set", *TINY, *sizes, *rounds]) == 0
    small, mapped = json.loads(record.read_text())["measured"].values()
    assert (small["store"], mapped["store"]) == ("host", "mmap")
    assert mapped["bytes"] > 5 * small["bytes"]
    assert len(mapped["slower"]) == 2
    assert mapped["moved_bytes"] == mapped["unique_rows"] * 2 * 8 * 4
    assert not list((tmp_path / "mapped").iterdir())
    printed = capsys.readouterr().out
    assert "0.001 GiB mapped" in printed
    assert "stall ms" in printed


def test_what_cannot_be_measured_is_refused(capsys):
    assert main(["bench", "tables", "--config", "bench/train"]) == 2
    assert main(["bench", "tables", "--set", "model.engram.compression=true"]) == 2
    assert main(["bench", "tables", "--tokens", "text"]) == 2
    assert "synthetic" in capsys.readouterr().err
    assert main(["bench", "tables", "--mapped-gib", "100000000"]) == 2
    assert "--mapped-gib: " in capsys.readouterr().err
