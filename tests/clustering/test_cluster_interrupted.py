"""Clustering that is killed goes on to the same result, wherever it was killed; and what it keeps in memory."""

import errno
import fcntl
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from kmem.cli import main
from kmem.clustering.applying import WORKING, apply_tree
from kmem.clustering.building import TreeRequest, make_tree
from kmem.clustering.workspace import Pool, Workspace
from kmem.config import UserError
from tests.clustering.cluster_case import code, problems, prose
from tests.warm_processes import WITH_KMEM, WarmProcess


@pytest.fixture
def corpus(make_corpus, tmp_path):
    folder = make_corpus([*problems(30), *prose(30), *code(30)], vocab_size=800, validation_share=0.1)
    return shutil.copytree(folder, tmp_path / "data")


@pytest.fixture
def addressed(corpus, tmp_path):
    """(a folder without addresses, a tree, the addresses that the folder gets)."""
    bare = shutil.copytree(corpus, tmp_path / "bare")
    make_tree(TreeRequest([corpus], tmp_path / "tree", 3, 2, embedder="tfidf", options={"dim": 16}))
    return bare, tmp_path / "tree", (corpus / "train.addresses.npy").read_bytes()


def cluster_processes(*arguments):
    """In a process that has imported kmem, and now imports what clustering needs."""
    from tests.clustering.cluster_processes import main as run_cases

    run_cases(*arguments)


@pytest.mark.parametrize(
    ("step", "units"), [((13, 4), 6000), pytest.param((1, 1), 60_000, marks=pytest.mark.full, id="everywhere")]
)
def test_kills_change_no_bit_and_memory_does_not_grow_with_the_corpus(addressed, tmp_path, step, units):
    """One process imports everything and forks all others."""
    bare, tree, _ = addressed
    cases = [f"make:{step[0]}", f"apply:{step[1]}", f"memory:{units}"]
    process = WarmProcess(WITH_KMEM, cluster_processes, bare, tree, tmp_path / "processes", cases)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, out + errors
    found = json.loads(out.splitlines()[-1])
    for case, least in zip(cases, (70, 20), strict=False):
        assert found[case]["changes"] > least
        assert found[case]["different"] == {}
        assert "data/addresses.json" in found[case]["files"]
        assert not any(WORKING in name for name in found[case]["files"])
    small, large = found[cases[2]]
    embeddings = 4 * units * 512 * 4  # bytes that the larger corpus has more
    assert large - small < 0.5 * embeddings


@pytest.mark.parametrize("record", ["", "[]", '{"train": "x"}'])
def test_a_record_that_cannot_be_read_claims_nothing(addressed, record):
    bare, tree, expected = addressed
    _interrupt(bare, tree)
    (bare / WORKING / "done.json").write_text(record)
    apply_tree([bare], tree)
    assert (bare / "train.addresses.npy").read_bytes() == expected


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_stage_whose_file_is_damaged_is_done_again(addressed, damage):
    bare, tree, expected = addressed
    _interrupt(bare, tree)
    file = bare / WORKING / "train.array"
    if damage == "missing":
        file.unlink()
    else:
        with open(file, "r+b") as opened:
            opened.truncate(8)
    apply_tree([bare], tree)
    assert (bare / "train.addresses.npy").read_bytes() == expected


def _interrupt(folder, tree):
    """Work on the addresses that has come to its end, but is not stored."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kmem.clustering.applying.write_addresses", None)
        with pytest.raises(TypeError):
            apply_tree([folder], tree)
    done = json.loads((folder / WORKING / "done.json").read_text())
    assert done["train"] > 0


def test_sums_are_continued_and_count_nothing_twice(tmp_path):
    jobs, calls = list(range(10)), []

    def one_hot(job):
        calls.append(job)
        if job == 6 and len(calls) == 7:
            raise KeyboardInterrupt
        return np.eye(10, dtype=np.int64)[job]

    for attempt in range(3):
        total = np.ones(10, dtype=np.int64)
        with Pool(1) as pool:
            workspace = Workspace(tmp_path / "work", pool, {"plan": 1}, force=False)
            if attempt == 0:
                with pytest.raises(KeyboardInterrupt):
                    workspace.add_up("count", "counting", jobs, one_hot, total)
                continue
            workspace.add_up("count", "counting", jobs, one_hot, total)
        assert total.tolist() == [2] * 10
        assert calls == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
    assert {file.name for file in (tmp_path / "work").glob("count.*")} == {"count.sum"}
    (tmp_path / "work" / "count.sum").unlink()
    with Pool(1) as pool:
        again = np.zeros(10, dtype=np.int64)
        Workspace(tmp_path / "work", pool, {"plan": 1}, force=False).add_up("count", "counting", jobs, one_hot, again)
    assert again.tolist() == [1] * 10


def test_an_embedder_that_cannot_be_made_leaves_nothing_in_the_way(corpus, tmp_path):
    request = {"data": [corpus], "out": tmp_path / "tree", "children": 3, "levels": 1, "embedder": "tfidf"}
    with pytest.raises(UserError, match="--dim 5000: "):
        make_tree(TreeRequest(**request, options={"dim": 5000}))
    make_tree(TreeRequest(**request, options={"dim": 8}))


def test_what_an_earlier_command_left_does_not_come_into_the_tree(corpus, tmp_path):
    left = tmp_path / "tree.partial" / "embedder" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    done = make_tree(TreeRequest([corpus], tmp_path / "tree", 3, 1, embedder="tfidf"))
    files = {file.name for file in (tmp_path / "tree" / "embedder").iterdir()}
    assert files == set(done.tree.record["embedder"]["files"])


def test_addresses_given_meanwhile_are_not_replaced(addressed, tmp_path, monkeypatch):
    """A tree is interrupted, another one is applied, and the first is continued."""
    bare, tree, _ = addressed
    request = TreeRequest([bare], tmp_path / "second", 3, 1, embedder="tfidf", options={"dim": 16})
    with monkeypatch.context() as patched:
        patched.setattr("kmem.clustering.building.write_addresses", None)
        with pytest.raises(TypeError):
            make_tree(request)
    apply_tree([bare], tree)
    kept = (bare / "train.addresses.npy").read_bytes()
    with pytest.raises(UserError, match=rf"{bare}/addresses\.json: .*\btree \([0-9a-f]+\).*--force"):
        make_tree(request)
    assert (bare / "train.addresses.npy").read_bytes() == kept
    make_tree(replace(request, force=True))
    assert (bare / "train.addresses.npy").read_bytes() != kept


def test_one_process_at_a_time(addressed, capsys):
    bare, tree, addresses = addressed
    _interrupt(bare, tree)
    command = ["data", "cluster", "--data", str(bare), "--tree", str(tree)]
    other = os.open(bare / WORKING, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert main(command) == 2
    assert re.search(rf"{bare / WORKING}: .*\banother\b.*kmem data cluster", capsys.readouterr().err)
    os.close(other)
    assert main(command) == 0
    assert (bare / "train.addresses.npy").read_bytes() == addresses
    assert main([*command[:4], str(bare), *command[4:]]) == 2
    assert re.search(f"--data {bare}: .*twice", capsys.readouterr().err)


def test_a_full_disk_is_one_error(addressed, capsys, monkeypatch):
    bare, tree, _ = addressed

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(bare / "train.addresses.npy.partial"))

    monkeypatch.setattr("kmem.clustering.applying.write_addresses", full)
    assert main(["data", "cluster", "--data", str(bare), "--tree", str(tree)]) == 2
    assert f"{bare / 'train.addresses.npy.partial'}: {os.strerror(errno.ENOSPC)}" in capsys.readouterr().err


def test_trees_made_in_one_place_have_their_own_embedders(corpus, tmp_path):
    """In one process: an embedder that was there before is not taken for the new one."""
    for options, seed in (({"dim": 16}, 1), ({"dim": 16}, 2)):
        request = TreeRequest([corpus], tmp_path / "tree", 3, 2, embedder="tfidf", options=options, seed=seed)
        make_tree(replace(request, force=True))
    found = (corpus / "train.addresses.npy").read_bytes()
    shutil.copytree(tmp_path / "tree", tmp_path / "copy")
    apply_tree([corpus], tmp_path / "copy", force=True)
    assert (corpus / "train.addresses.npy").read_bytes() == found
