"""`kmem bench attention` at sizes that say nothing about speed."""

import json

from kmem.cli import main


def test_packed_documents_are_measured_against_their_mask(tmp_path, capsys):
    record = tmp_path / "attention.json"
    words = ["--lengths", "16", "17000", "--tokens", "32", "--heads", "1", "--width", "4", "--document", "8"]
    assert main(["bench", "attention", *words, "--threads", "1", "--repeats", "1", "--json", str(record)]) == 0
    short, long = json.loads(record.read_text())["measured"]
    assert (short["length"], short["mask"] > 0) == (16, True)
    assert (long["length"], long["mask"]) == (17000, None)  # too large for memory
    assert "packed / mask" in capsys.readouterr().out
