"""`kmem bench rows` at sizes that say nothing about speed."""

import json

import pytest

from kmem.cli import main

TINY = ["--rows", "3000", "--touched", "1000", "--dim", "16", "--threads", "2", "--repeats", "1"]


def test_every_work_is_measured_against_its_peer(tmp_path, capsys):
    record = tmp_path / "rows.json"
    assert main(["bench", "rows", *TINY, "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    assert "1,000 uniform look-ups in 3,000 fp32 rows of 16 values" in found["shape"]
    adam, both, gather = found["measured"]
    assert [(row["work"], row["threads"]) for row in (adam, both, gather)] == [
        ("lazy Adam", 1),
        ("lazy Adam", 2),
        ("gather", 2),
    ]
    for row in (adam, both):
        assert row["ratio"] == pytest.approx(row["rate"] / row["peer_rate"])
    assert gather["ratio"] == pytest.approx(gather["rate"] / (2 * gather["peer_rate"]))
    assert {row["met"] for row in found["measured"]} == {None}  # goals are for tables that no cache holds
    printed = capsys.readouterr().out
    assert "SparseAdam" in printed
    assert "index_select" in printed


def test_updates_of_all_optimizers(tmp_path):
    record = tmp_path / "rows.json"
    assert main(["bench", "rows", *TINY, "--optimizers", "--json", str(record)]) == 0
    updates = [row for row in json.loads(record.read_text())["measured"] if row["work"].startswith("update")]
    assert len(updates) == 4 * 2
    assert all(row["rate"] > 0 and row["peer"] is None for row in updates)


def test_sizes_must_be_positive(capsys):
    assert main(["bench", "rows", "--rows", "0"]) == 2
    assert "--rows" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "missing" / "rows.json", "/proc/rows/x.json"):
        with pytest.raises(SystemExit) as error:
            main(["bench", "rows", *TINY, "--json", str(path)])
        assert error.value.code == 2
        assert f"--json: {path}: give a file in a folder that exists" in capsys.readouterr().err
