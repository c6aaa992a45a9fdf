"""Runs that train the blocks of different subtrees with one frozen anchor: merged, they are the run that trains all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kmem.checkpoint.bank.editing import Source, erase, merge
from kmem.checkpoint.bank.rows import written_norms
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.model.bank_layout import MISSING, BankLayout
from tests.distributed.bank_case import CHILDREN, LEAVES, bank_config

STEPS = 3
FROZEN = {"children": CHILDREN, "levels": (5, 2, 0, 1), "anchor": "frozen"}


def subtree_case(tree: dict[str, Any], run: str, plan: list[tuple[int, list[int]]]) -> list[float]:
    """Train on the text of some steps, in each with the blocks of some clusters of level 1 alone, and save."""
    from kmem.checkpoint.commit import Progress
    from kmem.checkpoint.store import CheckpointStore
    from kmem.parallel.training_state import optimizer_steps
    from kmem.train.saving import save_training
    from tests.distributed.training_case import build, step_batches

    pipeline = build(tree)
    losses = []
    for step, subtrees in plan:
        batches = []
        for batch in step_batches(pipeline, step):
            mine = torch.isin(batch.addresses // (LEAVES // CHILDREN), torch.tensor(subtrees))
            batches.append(replace(batch, addresses=batch.addresses.masked_fill(~mine, MISSING)))
        losses.append(pipeline.train_step(batches, lr=pipeline.config.train.optimizer.lr).loss)
    steps = len(plan)
    progress = Progress(steps, 8 * steps, 100 * steps, optimizer_steps(pipeline))
    save_training(CheckpointStore(Path(run) / "checkpoints"), pipeline, progress)
    pipeline.close()
    return losses


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """Folder with the run of all subtrees, those of some, and one that went on for a step more."""
    root = tmp_path_factory.mktemp("merge")
    # Without experts: their balance losses make the gradients of a block depend on all text of a step.
    config = bank_config(model__bank=FROZEN, model__moe=None, bank__optimizer__name="adam_catchup")
    for name, subtrees, steps in [
        ("all", [0, 1, 2], STEPS),
        ("first", [0], STEPS),
        ("rest", [1, 2], STEPS),
        ("overlapping", [0, 1], STEPS),
        ("late", [1, 2], STEPS + 1),
    ]:
        ranks.run(1, subtree_case, config, str(root / name), [(step, subtrees) for step in range(steps)])
    return root


def stored(reader):
    """All but the counts of text (`hits/bank` and its like), which stay those of the run that is copied."""
    tensors = reader.commit.tensors.items()
    return {key: reader.read_stored(key, 0, tensor.size) for key, tensor in tensors if "/bank" not in key}


def test_a_merge_is_the_single_run(runs, tmp_path, capsys):
    expected = stored(CheckpointReader(runs / "all"))
    for number, words in enumerate(
        [
            ["--from", f"{runs}/first", "--from", f"{runs}/rest"],
            ["--from", f"{runs}/rest", "--from", f"{runs}/first"],
            ["--from", f"{runs}/first", "0", "--from", f"{runs}/rest", "1", "2"],
            ["--from", f"{runs}/overlapping", "0", "--from", f"{runs}/rest", "1", "2"],
        ]
    ):
        out = tmp_path / f"merged-{number}"
        assert main(["bank", "merge", *words, "--out", str(out)]) == 0
        merged = CheckpointReader(out)
        merged.verify()
        found = stored(merged)
        assert found.keys() == expected.keys()
        for key, values in expected.items():  # the order of sums over the tokens of a step differs
            torch.testing.assert_close(found[key], values, rtol=0, atol=1e-6)
        printed = capsys.readouterr().out
        assert ("left out: " in printed) == (number == 3)
    layout = BankLayout.of(merged.config.model.shape)
    for number, name in enumerate(["overlapping", "rest", "rest"]):
        source = stored(CheckpointReader(runs / name))
        for key in source:
            level = int(key[-1]) if ".bank." in key and not key.startswith("step/") else None
            if level is not None:
                rows = slice(*(part * layout.rows(level) // CHILDREN for part in (number, number + 1)))
                one, other = (values[key].view(layout.rows(level), -1)[rows] for values in (found, source))
                assert torch.equal(one, other), key
    assert merged.commit.progress.tokens == 100 * STEPS * 2
    assert merged.commit.progress.facts["edited"] == "merged overlapping, rest"
    assert merged.config.name == "merged-3"


def test_blocks_that_count_their_own_steps_do_not_see_how_jobs_are_cut(ranks, runs, tmp_path):
    """Steps without text of a subtree may be left out of its job: to the bit."""
    config = bank_config(model__bank=FROZEN, model__moe=None)
    plan = [(0, [0]), (1, [1, 2]), (2, [1, 2]), (3, [0]), (4, [2])]
    for name, part in [("all", plan), ("first", plan[:1] + plan[3:4]), ("rest", plan[1:3] + plan[4:])]:
        ranks.run(1, subtree_case, config, str(tmp_path / name), part)
    merge([Source(CheckpointReader(tmp_path / name)) for name in ("first", "rest")], tmp_path / "out")
    found, expected = (stored(CheckpointReader(tmp_path / name)) for name in ("out", "all"))
    for key, values in expected.items():
        assert key.startswith("step/") or torch.equal(found[key], values), key
    assert {0, 1, 2} <= set(found["updates/layers.0.bank.level4"].tolist())
    with pytest.raises(CheckpointError, match=r"bank\.optimizer\.name .*adam_catchup, .*lazy_adam "):
        merge([Source(CheckpointReader(run)) for run in (tmp_path / "first", runs / "rest")], tmp_path / "none")


def test_of_runs_of_other_lengths_each_gives_its_rows(runs, tmp_path):
    first, late = CheckpointReader(runs / "first"), CheckpointReader(runs / "late")
    (checkpoint, _), _ = merge([Source(first), Source(late)], tmp_path / "out")
    merged = CheckpointReader(tmp_path / "out")
    assert merged.step == STEPS + 1
    assert checkpoint == merged.folder
    layout = BankLayout.of(merged.config.model.shape)
    for level in layout.levels:
        found, one, other = (written_norms(reader, layout, level) for reader in (merged, first, late))
        share = layout.rows(level) // CHILDREN
        assert torch.equal(found, torch.cat((one[:share], other[share:])))


def test_a_row_of_two_runs_is_a_conflict(runs, tmp_path):
    readers = {name: CheckpointReader(runs / name) for name in ("first", "rest", "overlapping", "all")}
    with pytest.raises(CheckpointError, match=r"level 1, cluster 1: .*/overlapping/.*/rest/.*--from"):
        merge([Source(readers["overlapping"]), Source(readers["rest"])], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"level 2, cluster 1\.2: .*/overlapping/.*/rest/.*--from"):
        merge([Source(readers["overlapping"], ("0", "1.2")), Source(readers["rest"], ("1",))], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"^cluster 1\.2: .*/first/.*kmem bank list"):
        merge([Source(readers["first"], ("0", "1.2")), Source(readers["rest"], ("1", "2"))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_has_changed_since_the_start_counts(runs, tmp_path):
    """Of runs that went on from a trained bank, the rows that differ from it are taken, and the others are its own."""
    start = CheckpointReader(runs / "all")
    for name, paths in [("one", ["0"]), ("two", ["1.1", "2"]), ("both", ["0", "1.1", "2"])]:
        erase(start, tmp_path / name, paths, subtree=True)
    one, two, both = (CheckpointReader(tmp_path / name) for name in ("one", "two", "both"))
    with pytest.raises(CheckpointError, match=r"cluster .*/one/.*/two/.*--start"):
        merge([Source(one), Source(two)], tmp_path / "none")
    merge([Source(one), Source(two)], tmp_path / "out", start)
    found, expected = stored(CheckpointReader(tmp_path / "out")), stored(both)
    assert all(torch.equal(found[key], values) for key, values in expected.items())


def test_what_is_erased_is_as_if_no_text_had_reached_it(runs, tmp_path, capsys):
    """Blocks and the state of their optimizer; nothing else has changed."""
    out = tmp_path / "out"
    command = ["bank", "erase", "0", "1.2", "--subtree", "--checkpoint", str(runs / "all"), "--out", str(out)]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    layout = BankLayout.of(CheckpointReader(runs / "all").config.model.shape)
    assert re.search(rf"level 1: .*\b1 cluster .* {layout.row_values(1):,} values", printed)
    assert re.search(rf"level 4: .*\b36 clusters .* {36 * layout.row_values(4):,} values", printed)
    whole, never, erased = (stored(CheckpointReader(folder)) for folder in (runs / "all", runs / "rest", out))
    assert whole.keys() == erased.keys()
    for key, values in whole.items():
        if ".bank." not in key or key.startswith("step/"):
            assert torch.equal(erased[key], values), key
            continue
        rows = layout.rows(int(key[-1]))
        one, before, other = (values.view(rows, -1) for values in (erased[key], whole[key], never[key]))
        assert torch.equal(one[: rows // 3], other[: rows // 3]), key
        gone = slice(rows // 3 + 2 * rows // 9, 2 * rows // 3) if rows > 3 else slice(0)
        kept = torch.ones(rows, dtype=torch.bool)
        kept[: rows // 3] = kept[gone] = False
        assert torch.equal(one[kept], before[kept]), key
        assert key.startswith("weight/") or not bool(one[gone].any()), key
    assert CheckpointReader(out).facts["edited"] == "erased 0, 1.2 with all below"

    back = tmp_path / "back"
    command = ["bank", "replace", "0", "1", "--subtree", "--checkpoint", str(out), "--from", str(runs / "all")]
    assert main([*command, "--out", str(back)]) == 0
    assert "replaced" in capsys.readouterr().out
    assert all(torch.equal(values, whole[key]) for key, values in stored(CheckpointReader(back)).items())
    assert re.search(r"; replaced 0, 1 .*\ball$", CheckpointReader(back).facts["edited"])
