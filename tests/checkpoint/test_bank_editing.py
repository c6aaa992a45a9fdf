"""`kmem bank` on checkpoints of random blocks: what is listed, edited, and refused."""

import json
import re
import shutil

import pytest
import torch

from kmem.checkpoint import pieces, writer
from kmem.checkpoint.bank import rows as bank_rows
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from tests.hf.banks import BANKS, bank, random_bank, write_bank_run
from tests.hf.models import NATIVE, write_run

CHOSEN = ["ffn", "lora_qk", "kv"]


def memory(capsys, *words):
    assert main(["bank", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    assert main(["bank", *map(str, words)]) == 2
    return " ".join(capsys.readouterr().err.split())


def blocks(reader):
    return {name: reader.read(name) for name in reader.tensors if ".bank." in name}


@pytest.fixture
def small_pieces(monkeypatch):
    """Entries, files and slices so short that rows lie across them."""
    monkeypatch.setattr(writer, "CHUNK_ELEMENTS", 101)
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 101)
    monkeypatch.setattr(bank_rows, "SLICE_BYTES", 2_000)


@pytest.mark.parametrize("name", CHOSEN)
def test_list_gives_sizes_and_norms(name, tmp_path, capsys, small_pieces):
    decoder = random_bank(BANKS[name])
    layout = decoder.layout
    writing = [part.name for part in layout.parts if part.start == "zero"]
    for layer_blocks in layout.by_layer(decoder.rows[2], 2).values():
        for part, values in layout.by_part(layer_blocks).items():
            if part in writing:
                values[4] = 0  # no text has reached 1.1
    reader = write_bank_run(tmp_path / "run", BANKS[name], decoder)
    listed = json.loads(memory(capsys, "list", "--checkpoint", tmp_path / "run", "1", "generic", "--json"))
    assert listed["step"] == reader.step
    first, second = listed["levels"]
    assert (first["clusters"], first["untouched"], second["clusters"], second["untouched"]) == (3, 0, 9, 1)
    assert second["values_per_cluster"] == layout.row_values(2)
    assert second["bytes"] == 4 * 10 * layout.row_values(2)
    clusters = {(cluster["path"], cluster["level"]): cluster for cluster in listed["clusters"]}
    assert clusters.keys() == {("1", 1), ("1.0", 2), ("1.1", 2), ("1.2", 2), ("generic", 1), ("generic", 2)}
    assert clusters["1.1", 2]["untouched"]
    row = sum(
        layout.by_part(found[3:4])[part].double().square().sum()
        for found in layout.by_layer(decoder.rows[2], 2).values()
        for part in writing
    )
    assert clusters["1.0", 2]["norm"] == pytest.approx(float(row.sqrt()), rel=1e-6)
    printed = memory(capsys, "list", "--checkpoint", tmp_path / "run", "1")
    assert "untouched" in printed
    assert "1.1" in printed


def test_list_shows_the_tokens_of_named_clusters_without_blocks(tmp_path, capsys, monkeypatch):
    run = write_bank_run(tmp_path / "run", bank(levels=[0, 3])).run_folder
    words = ("list", "--checkpoint", run, "1", "1.2", "generic")
    bare, *others = json.loads(memory(capsys, *words, "--json"))["clusters"]
    assert bare == {"path": "1", "level": 1, "norm": None, "untouched": None, "tokens": None}
    assert [found["path"] for found in others] == ["1.0", "1.1", "1.2", "generic"]
    monkeypatch.setattr(bank_rows, "stored_hits", lambda reader: torch.arange(10))  # of the leaves, and 9 generic ones
    listed = json.loads(memory(capsys, *words, "--json"))["clusters"]
    assert [found["tokens"] for found in listed] == [3 + 4 + 5, 3, 4, 5, 9]
    shallow = write_bank_run(tmp_path / "shallow", bank(levels=[5, 0])).run_folder
    assert [
        (found["path"], found["tokens"])
        for found in json.loads(memory(capsys, "list", "--checkpoint", shallow, "1.2", "2", "1.2", "--json"))[
            "clusters"
        ]
    ] == [("2", 6 + 7 + 8), ("1.2", 5)]
    row = next(line for line in memory(capsys, "list", "--checkpoint", shallow, "1.2").splitlines() if "1.2" in line)
    assert "no blocks (rank 0)" in row
    assert row.split()[-2] == "5"
    out = tmp_path / "out"
    for action in (("erase",), ("replace", "--from", shallow)):
        complaint = refused(capsys, *action, "1.2", "--subtree", "--checkpoint", shallow, "--out", out)
        assert re.search(r"cluster 1\.2: .*level 2\b.*rank\b.*\b0\b", complaint)
    assert not out.exists()
    assert re.search(r"cluster 1\.7: .*\b0 to 2\b", refused(capsys, "list", "--checkpoint", shallow, "1.7"))


@pytest.mark.parametrize("name", CHOSEN)
def test_erased_blocks_are_those_of_a_new_bank(name, tmp_path, capsys, small_pieces):
    decoder = random_bank(BANKS[name])
    reader = write_bank_run(tmp_path / "run", BANKS[name], decoder)
    before = {file: file.read_bytes() for file in reader.folder.iterdir()}
    printed = memory(capsys, "erase", "1.1", "generic", "2", "--checkpoint", reader.folder, "--out", tmp_path / "out")
    layout = decoder.layout
    assert re.search(rf"level 2: .*\b2 clusters\b.* {2 * layout.row_values(2):,} values", printed)
    assert all(file.read_bytes() == content for file, content in before.items())
    again = CheckpointReader(tmp_path / "out")
    again.verify()
    assert (again.run_folder / "tokenizer" / "tokenizer.json").is_file()
    assert (again.run_folder / "tree" / "tree.json").is_file()
    assert (again.run_folder / "config.yaml").is_file()
    assert (again.config.name, again.commit.manifests["bank"]) == ("out", reader.commit.manifests["bank"])
    seed = reader.config.train.init_seed
    for level, erased in ((1, [2, 3]), (2, [4, 9])):
        fresh = layout.by_layer(layout.initial_rows(seed, level, 0, layout.rows(level)), level)
        for layer, values in fresh.items():
            stored = again.read(f"layers.{layer}.bank.level{level}")
            old = reader.read(f"layers.{layer}.bank.level{level}")
            for row in range(layout.rows(level)):
                assert torch.equal(stored[row], values[row] if row in erased else old[row])
    listed = json.loads(memory(capsys, "list", "--checkpoint", tmp_path / "out", "--json"))["levels"]
    assert [level["untouched"] for level in listed] == [1, 1]
    assert [level["generic_norm"] for level in listed] == [0, 0]


def test_blocks_of_another_checkpoint(tmp_path, capsys, small_pieces):
    decoder, other = random_bank(BANKS["ffn"]), random_bank(BANKS["ffn"])
    for rows in other.rows.values():
        rows.neg_()
    run, source = write_bank_run(tmp_path / "run", BANKS["ffn"], decoder), tmp_path / "source"
    write_bank_run(source, BANKS["ffn"], other)
    memory(capsys, "replace", "0", "--subtree", "--checkpoint", run.folder, "--from", source, "--out", tmp_path / "out")
    again = CheckpointReader(tmp_path / "out")
    for name, values in blocks(run).items():
        found, taken = again.read(name), 3 if name.endswith("2") else 1
        assert torch.equal(found[:taken], -values[:taken])
        assert torch.equal(found[taken:], values[taken:])

    different = random_bank(BANKS["ffn"], seed=5)
    write_bank_run(tmp_path / "anchor", BANKS["ffn"], different)
    words = ["replace", "0", "--checkpoint", run.folder, "--out", tmp_path / "none", "--from"]
    assert re.search(
        rf"{tmp_path / 'anchor'}/.*norm\.weight.*model\.bank\.anchor=frozen",
        refused(capsys, *words, tmp_path / "anchor"),
    )
    write_bank_run(tmp_path / "form", bank(levels=[5, 4]))
    assert re.search(
        rf"{tmp_path / 'form'}/.*{run.folder}: ranks \(model\.bank\)", refused(capsys, *words, tmp_path / "form")
    )
    assert not (tmp_path / "none").exists()


def test_bad_input(tmp_path, capsys):
    run = write_bank_run(tmp_path / "run", bank(levels=[0, 3], generic={"probability": 0})).run_folder
    out = tmp_path / "out"
    for path, complaint in [
        ("3.1", r"cluster 3\.1: .*\b0 to 2\b"),
        ("0.1.2", r"cluster 0\.1\.2: .*\b1 to 2 parts"),
        ("a", "cluster 'a': "),
        ("0", r"cluster 0: .*level 1\b.*rank\b.*\b0\b.*--subtree"),
        ("generic", r"generic: .*bank\.generic\.probability"),
    ]:
        assert re.search(complaint, refused(capsys, "erase", path, "--checkpoint", run, "--out", out))
    assert not out.exists()
    memory(capsys, "erase", "0", "--subtree", "--checkpoint", run, "--out", out)
    assert f"{out}: exists" in refused(capsys, "erase", "0.0", "--checkpoint", run, "--out", out)
    assert re.search("--from: .*two runs", refused(capsys, "merge", "--from", run, "--out", tmp_path / "merged"))
    write_run(tmp_path / "plain", NATIVE["llama"])
    assert re.search(
        rf"{tmp_path / 'plain'}/.*\(model\.bank\)", refused(capsys, "list", "--checkpoint", tmp_path / "plain")
    )
    part = next(CheckpointReader(run).folder.glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    shutil.rmtree(out)
    assert re.search(f"{part}: .*digest", refused(capsys, "erase", "0.0", "--checkpoint", run, "--out", out))
