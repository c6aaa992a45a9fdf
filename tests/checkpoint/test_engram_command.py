"""`kmem engram` on a trained run and on random rows: what is listed, which rows a text reads, what is erased."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kmem.checkpoint import pieces, writer
from kmem.checkpoint.engram import rows as engram_rows
from kmem.checkpoint.engram.rows import checkpoint_addresses
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.config import dump_config, parse_config
from kmem.data.tokenizer import load_tokenizer
from kmem.model.engram_reader import table_name
from tests.distributed.training_case import small_config
from tests.hf.models import MEMORY, NATIVE, write_run
from tests.train.trainer_case import trainer_case

LAYERS = [1, 3]


@pytest.fixture(scope="module")
def trained(ranks, corpus, tmp_path_factory):
    """(configuration, reader) of a run: rows in bf16, their state in fp32 and int32."""
    tree = small_config(
        name="trained",
        folder=str(tmp_path_factory.mktemp("runs")),
        model__vocab_size=257,
        model__engram={"layers": LAYERS, "heads": 2, "rows_per_head": 150, "row_dim": 8},
        engram={"dtype": "bf16", "optimizer": {"name": "adam_catchup"}},
        data={"sources": [{"path": str(corpus)}], "sequence_length": 32},
        train__steps=2,
        train__schedule={"kind": "constant"},
        evaluation={"sequences": 6, "at_start": False},
        tracking={"wandb": "disabled"},
    )
    assert ranks.run(1, trainer_case, tree)[0]["error"] is None
    return tree, CheckpointReader(Path(tree["folder"]) / "trained")


@pytest.fixture
def small_pieces(monkeypatch):
    """Entries and slices so short that rows lie across them."""
    monkeypatch.setattr(writer, "CHUNK_ELEMENTS", 101)
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 101)
    monkeypatch.setattr(engram_rows, "SLICE_BYTES", 1_000)


def engram(capsys, *words):
    capsys.readouterr()
    assert main(["engram", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["engram", *map(str, words)]) == 2
    return " ".join(capsys.readouterr().err.split())


def inside(reader, table, text):
    """(order, position of the last token, head) -> row, of the n-grams wholly inside a text, from the manifest."""
    tokenizer = load_tokenizer(reader.tokenizer_path)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    compression = checkpoint_addresses(reader).compression
    ids = ids if compression is None else compression.lookup[ids].tolist()
    made = reader.addressing
    sizes, multipliers, found = made["sizes"][table], made["multipliers"][table], {}
    for number, order in enumerate(made["orders"]):
        for last in range(order - 1, len(ids)):
            mix = 0
            for back in range(order):
                mix ^= ids[last - back] * multipliers[back]
            for head in range(made["heads"]):
                place = number * made["heads"] + head
                found[order, last, head] = mix % sizes[place] + sum(sizes[:place])
    return found


def stored(reader, key):
    return reader.read_stored(key, 0, reader.commit.tensors[key].size)


def check_erased(reader, again, texts):
    """Rows of the texts are zeros, with their state; every other value is what it was. Returns the rows by layer."""
    expected = {}
    for table, layer in enumerate(reader.addressing["layers"]):
        expected[layer] = sorted({row for text in texts for row in inside(reader, table, text).values()})
    again.verify()
    assert again.commit.tensors.keys() == reader.commit.tensors.keys()
    for key in reader.commit.tensors:
        before, after = stored(reader, key), stored(again, key)
        assert before.dtype == after.dtype
        layer = next((layer for layer in expected if key.endswith(f"/{table_name(layer)}")), None)
        if layer is None or len(before) == 1:
            assert torch.equal(before, after), key
            continue
        shape = (reader.tensors[table_name(layer)].shape[0], -1)
        before, after = before.view(shape), after.view(shape)
        assert bool((before[expected[layer]] != 0).any())
        before[expected[layer]] = 0
        assert torch.equal(before, after), key
    return expected


def test_list_says_what_is_in_the_tables(trained, capsys, monkeypatch):
    monkeypatch.setattr(engram_rows, "SLICE_BYTES", 1_000)
    _, reader = trained
    listed = json.loads(engram(capsys, "list", "--checkpoint", reader.run_folder, "--json"))
    assert (listed["step"], [table["layer"] for table in listed["tables"]]) == (2, LAYERS)
    for table in listed["tables"]:
        name = table_name(table["layer"])
        rows = reader.read(name)
        assert (table["rows"], table["dim"], table["bytes"]) == (*rows.shape, rows.numel() * 2)
        assert (table["orders"], table["heads"]) == ([2, 3], 2)
        norms = rows.double().norm(dim=1)
        assert table["mean_norm"] == pytest.approx(float(norms.mean()), rel=1e-12)
        assert table["largest_norm"] == float(norms.max())
        touched = stored(reader, f"last_step/{name}") > 0
        assert 0 < table["updated"] == int(touched.sum()) < table["rows"]
    printed = engram(capsys, "list", "--checkpoint", reader.run_folder)
    table = listed["tables"][0]
    assert f"{table['updated'] / table['rows']:.2%}" in printed


def test_rows_without_optimizer_state(tmp_path, capsys):
    run = write_run(tmp_path / "run", MEMORY["qwen"]).run_folder
    (table,) = json.loads(engram(capsys, "list", "--checkpoint", run, "--json"))["tables"][:1]
    assert (table["updated"], table["rows"] % 128) == (None, 0)
    found = json.loads(engram(capsys, "inspect", "--checkpoint", run, "--text", "the model", "--json"))["ngrams"]
    assert {ngram["updated"] for ngram in found} == {None}
    engram(capsys, "inspect", "--checkpoint", run, "--text", "the model")


def test_inspect_gives_the_rows_of_every_ngram(trained, capsys):
    _, reader = trained
    text = " The <|endoftext|>"  # as in training, these are characters
    words = ["inspect", "--checkpoint", reader.run_folder, "--text", text]
    found = json.loads(engram(capsys, *words, "--json"))["ngrams"]
    assert len(found) == len(LAYERS) * len(text) * 2
    seen = set()
    for table, layer in enumerate(LAYERS):
        expected = inside(reader, table, text)
        name = table_name(layer)
        rows, last_step = reader.read(name).double(), stored(reader, f"last_step/{name}")
        for ngram in (ngram for ngram in found if ngram["layer"] == layer):
            order, position = ngram["order"], ngram["position"]
            assert ngram["text"] == text[max(0, position + 1 - order) : position + 1]
            assert ngram["missing"] == order - len(ngram["text"])
            for head, row in enumerate(ngram["rows"]):
                if not ngram["missing"]:
                    assert row == expected[order, position, head]
                assert ngram["norms"][head] == pytest.approx(float(rows[row].norm()), rel=1e-12)
                assert ngram["updated"][head] == bool(last_step[row] > 0)
                seen.add(ngram["updated"][head])
    assert seen == {True, False}
    only = json.loads(engram(capsys, *words, "--layer", 3, "--json"))["ngrams"]
    assert only == [ngram for ngram in found if ngram["layer"] == 3]
    printed = engram(capsys, *words, "--layer", 3)
    assert '[pad][pad]" "' in printed
    assert '"The"' in printed
    assert "layer 1" not in printed


def test_erased_rows_are_zeros_and_the_run_goes_on(trained, ranks, capsys, tmp_path):
    tree, reader = trained
    before = {file: file.read_bytes() for file in reader.folder.iterdir()}
    out = tmp_path / "erased"
    texts = ["the state of", "tables"]
    words = [word for text in texts for word in ("--text", text)]
    printed = engram(capsys, "erase", "--checkpoint", reader.run_folder, *words, "--out", out)
    again = CheckpointReader(out)
    expected = check_erased(reader, again, texts)
    for layer, rows in expected.items():
        assert f"layer {layer}: {len(rows)} of {reader.tensors[table_name(layer)].shape[0]} rows erased" in printed
    assert "the state" not in (again.folder / "checkpoint.json").read_text(), "what is to be forgotten is named nowhere"
    assert all(file.read_bytes() == content for file, content in before.items())
    facts = {**reader.commit.progress.facts, "edited": "erased the n-gram rows of 2 texts"}
    assert again.commit.progress == replace(reader.commit.progress, facts=facts, tracking={})
    assert (again.commit.manifests.get("engram"), again.commit.shapes) == (
        reader.commit.manifests.get("engram"),
        reader.commit.shapes,
    )
    assert (again.config.name, again.config.model) == ("erased", reader.config.model)
    assert (out / "config.yaml").read_text() == dump_config(again.config)
    found = json.loads(engram(capsys, "inspect", "--checkpoint", out, "--text", texts[0], "--json"))["ngrams"]
    inner = [ngram for ngram in found if not ngram["missing"]]
    assert {figure for ngram in inner for name in ("norms", "updated") for figure in ngram[name]} == {0}

    for command in (
        ["eval", "--checkpoint", out],
        ["generate", "--checkpoint", out, "--prompt", "the state", "--max-new-tokens", 3],
        ["export", "--checkpoint", out, "--out", tmp_path / "export"],
    ):
        assert main([*map(str, command)]) == 0
    going_on = parse_config(tree | {"name": "later", "checkpoint": {"resume": str(out)}}).model_dump(mode="json")
    going_on["train"]["steps"] = 3
    (answer,) = ranks.run(1, trainer_case, going_on)
    assert (answer["error"], answer["started_at"], answer["steps"]) == (None, 2, 3)


@pytest.mark.parametrize("name", ["deepseek", "deepseek-v4.1", "qwen in branches"])
def test_rows_that_lie_across_entries(name, tmp_path, capsys, small_pieces):
    reader = write_run(tmp_path / "run", MEMORY[name])
    (tmp_path / "texts").write_text("the model reads\n\n Export that wrote \n")
    engram(capsys, "erase", "--checkpoint", reader.folder, "--file", tmp_path / "texts", "--out", tmp_path / "out")
    again = CheckpointReader(tmp_path / "out")
    check_erased(reader, again, ["the model reads", " Export that wrote "])
    engram(capsys, "erase", "--checkpoint", again.folder, "--text", "the text", "--out", tmp_path / "twice")
    twice = CheckpointReader(tmp_path / "twice")
    assert twice.facts["edited"] == "erased the n-gram rows of 2 texts; erased the n-gram rows of 1 text"
    check_erased(reader, twice, ["the model reads", " Export that wrote ", "the text"])


def test_bad_input(trained, tmp_path, capsys):
    run, out = trained[1].run_folder, tmp_path / "out"
    erasing = ["erase", "--checkpoint", run, "--out", out]
    assert "--text: '' has no token" in refused(capsys, *erasing, "--text", "the state", "--text", "")
    assert "--text: 't' is 1 token, and the shortest n-grams of this model have 2" in refused(
        capsys, *erasing, "--text", "t"
    )
    assert "--text: '' has no token" in refused(capsys, "inspect", "--checkpoint", run, "--text", "")
    texts = tmp_path / "texts"
    texts.write_text("the state\n\nx\n")
    assert f"--file {texts}, line 3: 'x' is 1 token" in refused(capsys, *erasing, "--file", texts)
    texts.write_text(" \n")
    assert f"--file {texts}: no text in it" in refused(capsys, *erasing, "--file", texts)
    texts.write_bytes(b"\xff")
    assert f"--file {texts}: not readable as text" in refused(capsys, *erasing, "--file", texts)
    assert f"--file {tmp_path / 'none'}: not readable" in refused(capsys, *erasing, "--file", tmp_path / "none")
    assert not out.exists()
    assert "--layer 2: has no engram; layers with engram: 1, 3" in refused(
        capsys, "inspect", "--checkpoint", run, "--text", "the", "--layer", 2
    )
    out.mkdir()
    (out / "mine").touch()
    assert "is not an empty folder" in refused(capsys, *erasing, "--text", "the state")
    plain = write_run(tmp_path / "plain", NATIVE["llama"]).run_folder
    for words in (["list"], ["inspect", "--text", "the"], ["erase", "--text", "the", "--out", tmp_path / "other"]):
        assert "has no engram (model.engram)" in refused(capsys, *words, "--checkpoint", plain)
    damaged = write_run(tmp_path / "damaged", MEMORY["qwen"])
    part = next(damaged.folder.glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    complaint = refused(capsys, "erase", "--checkpoint", damaged.folder, "--text", "the text", "--out", tmp_path / "x")
    assert "does not match its digest" in complaint
    assert not (tmp_path / "x").exists()
