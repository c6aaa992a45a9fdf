"""`kmem bench fetch`: bytes are those of the blocks, deep levels alone where level 1 stays, and faults are named."""

import ctypes
import json
import mmap
import os
import re
import sys

import numpy as np
import pytest
import torch

from kmem.bench.fetch import measure, synthetic_bank
from kmem.bench.fetch_command import placements
from kmem.cli import main
from kmem.config import ConfigError
from kmem.hf.export import export
from kmem.tables import stores
from tests.hf.banks import BANKS, random_bank, write_bank_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fetch")
    export(write_bank_run(folder / "run", BANKS["ffn"]), folder / "out", max_shard_bytes=9_000, say=str)
    return folder / "out"


def test_an_export_is_measured(exported, tmp_path, capsys):
    layout = random_bank(BANKS["ffn"]).layout
    sizes = [4 * layout.row_values(level) for level in (1, 2)]
    words = ["bench", "fetch", "--model", str(exported), "--contexts", "3", "--json", str(tmp_path / "found.json")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert {"new topic: ms", "same level 1: ms", "faster by"} <= {part.strip() for part in printed.split("┃")}
    assert "descending the tree" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [times["placement"] for times in found["measured"]] == ["1=disk,2=disk", "1=ram,2=disk", "1=ram,2=ram"]
    for times in found["measured"]:
        assert [level["bytes"] for level in times["levels"]] == sizes
        assert (times["all_bytes"], times["deep_bytes"]) == (sum(sizes), sizes[1])
        assert min(times["all_ms"], times["deep_ms"], *(level["ms"] for level in times["levels"])) > 0


def test_random_blocks_need_no_model(tmp_path, capsys):
    words = ["--levels", "4,0,2", "--children", "2", "--layers", "3", "--width", "8", "--placement", "3=ram"]
    assert main(["bench", "fetch", "--contexts", "2", "--folder", str(tmp_path / "new"), *words]) == 0
    assert "1=disk,3=ram" in capsys.readouterr().out
    assert not list((tmp_path / "new").iterdir())
    bank = synthetic_bank(tmp_path, 3, 8, (4, 0, 2), 2)
    times = measure(bank, {1: "disk", 3: "disk"}, 2, 0, torch.empty(0, dtype=torch.bfloat16))
    assert [level.bytes for level in times.levels] == [3 * 3 * 4 * 8 * 2, 3 * 3 * 2 * 8 * 2]


def resident_pages(path):
    """Pages of a file that the system keeps in memory, by mincore(2) of a mapping of the test's own."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        states = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = np.frombuffer(mapped, dtype=np.uint8)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            place, length = ctypes.c_void_p(first.ctypes.data), ctypes.c_size_t(len(mapped))
            assert libc.mincore(place, length, states) == 0, os.strerror(ctypes.get_errno())
        finally:
            del first  # a mapping that is in use cannot be closed
        return sum(state & 1 for state in states)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore(2) as Linux has it")
def test_dropped_pages_are_read_again(tmp_path):
    """From the disk: none of a level's files is in memory before a fetch."""
    bank = synthetic_bank(tmp_path, 8, 64, (8, 2), 4)
    rows, (file,) = torch.arange(3), bank.rows[1].files
    before = bank.rows[1](rows)
    assert resident_pages(file.path) > 10
    with open(tmp_path / "probe", "wb") as probe:
        probe.write(bytes(1 << 16))
        probe.flush()
        os.fsync(probe.fileno())
        os.posix_fadvise(probe.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(tmp_path / "probe"):
        pytest.skip("this file system has its files in memory")
    file.drop_pages()
    assert resident_pages(file.path) == 0
    assert torch.equal(bank.rows[1](rows), before)
    assert resident_pages(file.path) > 0


def test_levels_that_do_not_fit_into_memory_are_refused(exported, monkeypatch, capsys):
    monkeypatch.setattr(stores, "available_host_memory", lambda: 1000.0)
    assert main(["bench", "fetch", "--model", str(exported), "--contexts", "1", "--placement", "1=ram"]) == 2
    assert re.search(r"--placement: .*\b23040 bytes\b.*\b1000 bytes\b", capsys.readouterr().err)


def test_faults_are_named(exported, tmp_path, capsys):
    for text, complaint in [
        ("1", "1=ram,2=disk"),
        ("1=cloud", "1=ram,2=disk"),
        ("3=ram", "levels 1, 2$"),
    ]:
        with pytest.raises(ConfigError, match=f"^--placement {text}: .*{complaint}"):
            placements(text, (1, 2))
    assert main(["bench", "fetch", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    assert main(["bench", "fetch", "--model", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'}: " in capsys.readouterr().err
    for run in (exported.parent / "run", exported.parent / "run" / "checkpoints"):
        assert main(["bench", "fetch", "--model", str(run)]) == 2
        assert f"kmem export --checkpoint {run} --out" in capsys.readouterr().err
    assert main(["bench", "fetch", "--levels", "0,0"]) == 2
    assert "--levels 0,0" in capsys.readouterr().err
    assert main(["bench", "fetch", "--contexts", "0"]) == 2
    assert "--contexts" in capsys.readouterr().err
