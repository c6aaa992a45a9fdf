"""What is read is verified: every reader refuses damage or takes the checkpoint before it, and names the file."""

import json
import re
import shutil

import pytest

from kmem.checkpoint.commit import COMMIT_FILE, Commit, _digest
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.hf.export import export
from kmem.hf.loading import load
from kmem.model.bank_tree import CENTROIDS_FILE
from tests.hf.banks import BANKS, make_tree, write_bank_run
from tests.hf.models import MEMORY, NATIVE, write_run

PLAIN = NATIVE["qwen3"]


def flip(path, place=-1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run and its export, a run with an engram, one with a bank, and a tree."""
    folder = tmp_path_factory.mktemp("runs")
    export(write_run(folder / "plain", PLAIN), folder / "export", say=str)
    write_run(folder / "engram", MEMORY["deepseek"])
    write_bank_run(folder / "bank", BANKS["ffn"])
    make_tree(folder / "tree")
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """copied(name) -> a copy that a test may damage."""
    return lambda name: shutil.copytree(runs / name, tmp_path / name)


def step_of(run, step=7):
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", ["generate", "--prompt", "the"]),
        ("plain", ["export", "--out", "OUT"]),
        ("engram", ["engram", "list"]),
        ("engram", ["engram", "inspect", "--text", "the"]),
        ("bank", ["bank", "list"]),
        ("export", ["generate", "--prompt", "the"]),
    ],
)
def test_every_reader_refuses_a_flipped_byte(copied, tmp_path, capsys, name, words):
    run = copied(name)
    part = next((run if name == "export" else step_of(run)).glob("*.safetensors"))
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words] + ["--checkpoint", str(run)]
    assert main([word for word in words]) == 0
    if "--out" in words:
        shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    flip(part, part.stat().st_size // 2)
    assert main(words) == 2
    assert str(part) in capsys.readouterr().err
    if words[0] != "export":
        assert main([*words, "--no-verify"]) == 0
        assert "not verified" in capsys.readouterr().err


def test_a_reader_takes_the_newest_sound_step_and_says_what_it_passed_over(copied, caplog):
    run = copied("plain")
    for step in (8, 9, 10):
        shutil.copytree(step_of(run), step_of(run, step))
    flip(next(step_of(run, 8).glob("*.safetensors")))
    (step_of(run, 9) / COMMIT_FILE).unlink()
    (step_of(run, 10) / COMMIT_FILE).write_bytes(b"[" * 100_000)
    assert CheckpointReader(run).folder == step_of(run)
    for step in (8, 9, 10):
        assert f"step-{step:08d}" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000008"):
        CheckpointReader(step_of(run, 8))


def test_a_purge_disturbs_no_reader(copied):
    """All files are open before the first is read."""
    run = copied("engram")
    reader = CheckpointReader(run)
    expected = CheckpointReader(run).read("embedding.weight")
    shutil.rmtree(step_of(run))
    assert reader.read("embedding.weight").equal(expected)
    (table,) = [name for name in reader.tensors if name.endswith("table") and "layers.0" in name]
    assert len(reader.map_rows(table)) == reader.tensors[table].shape[0]


def test_another_tokenizer_in_the_run_is_refused(copied, capsys):
    run = copied("plain")
    assert CheckpointReader(run).tokenizer_path == run / "tokenizer"
    path = run / "tokenizer" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[20:22]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tree))
    for words in (["generate", "--prompt", "the"], ["export", "--out", str(run / "out")]):
        assert main([*words, "--checkpoint", str(run)]) == 2
        assert re.search(r"tokenizer\.json: .*\bnot that of the tokenizer\b", capsys.readouterr().err)
    edit_commit(step_of(run), lambda body: body["progress"]["data"].pop("tokenizer_files"))  # as before files were kept
    assert main(["generate", "--prompt", "the", "--checkpoint", str(run)]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def edit_commit(folder, edit):
    """Change a commit file, and give it the digest of its new content."""
    path = folder / COMMIT_FILE
    body = json.loads(path.read_text())
    edit(body)
    body["digest"] = _digest(body)
    path.write_text(json.dumps(body))


def first(mapping):
    return next(iter(mapping.values()))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda body: body.pop("progress"), "progress"),
        (lambda body: body.update(config=[]), "config"),
        (lambda body: body["files"].update({"../x": {"bytes": 1, "sha256": ""}}), r"files: '\.\./x'"),
        (lambda body: first(body["tensors"]).update(dtype="F33"), "dtype 'F33'"),
        (lambda body: first(body["tensors"]).update(size=3), "tensors: "),
        (lambda body: first(body["tensors"])["chunks"][0].__setitem__(2, "other"), "'other'"),
        (lambda body: first(body["tensors"])["chunks"][0].__setitem__(0, -5), "tensors: "),
        (lambda body: body["shapes"].update(more=[2, 2]), "shapes: more"),
        (lambda body: body["shapes"].update({next(iter(body["shapes"])): [-1, -4]}), "shapes: "),
    ],
)
def test_a_commit_written_by_hand_is_checked(copied, edit, named):
    folder = step_of(copied("plain"))
    edit_commit(folder, edit)
    with pytest.raises(CheckpointError, match=rf"checkpoint\.json: .*{named}"):
        Commit.read(folder)


def test_verify_names_the_damaged_file(copied, corpus, tmp_path, capsys):
    data = shutil.copytree(corpus, tmp_path / "data")
    folders = [copied("plain"), copied("export"), copied("tree"), data]
    assert main(["verify", *map(str, folders)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert all(": sound, " in line for line in said)
    damaged = [
        next(step_of(folders[0]).glob("*.safetensors")),
        folders[1] / "generation_config.json",
        folders[2] / CENTROIDS_FILE,
        data / "train.bin",
    ]
    for path in damaged:
        flip(path, path.stat().st_size // 2)
    assert main(["verify", *map(str, folders)]) == 2
    said = capsys.readouterr().out.splitlines()
    assert all(f"DAMAGED: {path}" in line for path, line in zip(damaged, said, strict=True))
    assert main(["verify", str(tmp_path)]) == 2
    assert "no digests here" in capsys.readouterr().err


def test_a_damaged_export_is_not_imported(copied, tmp_path, capsys):
    folder = copied("export")
    weights = next(folder.glob("*.safetensors"))
    flip(weights, weights.stat().st_size // 2)
    assert main(["import", "--from", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert str(weights) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_users_edit_in_an_export_is_theirs(copied):
    folder = copied("export")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "README.md").write_text("Mine.")
    model, _ = load(folder)
    assert model.generation_config.temperature == 0.5
