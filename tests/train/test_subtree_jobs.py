"""Jobs that train the text of different subtrees with one frozen anchor: merged, they are the run that trains one
subtree after the other."""

import shutil
from copy import deepcopy

import pytest
import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from tests.data.cluster_case import give_addresses, write_tree
from tests.distributed.training_case import small_config
from tests.train.trainer_case import trainer_case

STEPS, BATCH = 3, 8
BANK = {"children": 2, "levels": [4, 2], "anchor": "frozen"}


class Runs:
    """Runs on one prepared folder with addresses of a tree of two levels of two children."""

    def __init__(self, ranks, corpus, root):
        self._ranks, self.root = ranks, root
        folder, tree = root / "prepared", write_tree(root / "tree", 2, 2)
        shutil.copytree(corpus, folder)
        give_addresses(folder, tree)
        self._config = small_config(
            folder=str(root),
            model__vocab_size=257,
            model__num_layers=2,
            model__memory_bank=BANK,
            data={"sources": [{"path": str(folder)}], "sequence_length": 32},
            data__addresses={"tree": str(tree), "batching": "leaf"},
            train__steps=STEPS,
            train__schedule={"kind": "constant"},
            # A larger eps: Adam makes a full step of a gradient that is 0 but for rounding.
            bank__optimizer={"eps": 1e-5, "weight_decay": 0.1},
            evaluation={"sequences": 4},
            tracking={"wandb": "disabled"},
        )

    def config(self, name, start=None, resume=None, subtrees=None, **changes):
        tree = deepcopy(self._config)
        tree["name"] = name
        tree["checkpoint"] = {
            "start": start and str(self.root / start),
            "resume": "auto" if resume is None else str(self.root / resume),
        }
        tree["data"]["addresses"]["subtrees"] = subtrees
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return tree

    def train(self, name, world=1, **changes):
        answers = self._ranks.run(world, trainer_case, self.config(name, **changes))
        assert [answer["error"] for answer in answers] == [None] * world
        return answers[0]

    def merge(self, name, *words):
        words = [str(self.root / word) if word in self.names() else word for word in words]
        assert main(["memory", "merge", *words, "--out", str(self.root / name)]) == 0

    def names(self):
        return [path.name for path in self.root.iterdir()]

    def read(self, name):
        return CheckpointReader(self.root / name)


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory):
    """An anchor, two jobs that begin with its weights, and their merge; and the run of one job after the other."""
    made = Runs(ranks, corpus, tmp_path_factory.mktemp("jobs"))
    made.train("anchor", model__memory_bank=None, data__addresses=None)
    for number in ("0", "1"):
        made.train(f"part-{number}", start="anchor", subtrees=[number])
    made.train("one-by-one", resume="part-0", subtrees=["1"], train__steps=2 * STEPS)
    made.merge("merged", "--from", "part-0", "--from", "part-1")
    return made


def stored(reader):
    """All that a checkpoint holds, but for the number of each table's steps, which are those of one job."""
    keys = [key for key in reader.commit.tensors if not key.startswith("step/")]
    return {key: reader.read_stored(key, 0, reader.commit.tensors[key].size) for key in keys}


def same(one, other):
    assert one.keys() == other.keys()
    return [key for key, values in one.items() if not torch.equal(values, other[key])]


def test_merged_jobs_are_the_run_of_one_subtree_after_the_other(runs):
    """Bit for bit: blocks, moments, and how often each was updated."""
    merged, single = runs.read("merged"), runs.read("one-by-one")
    assert same(stored(merged), stored(single)) == []
    anchor = runs.read("anchor")
    assert all(torch.equal(anchor.read(name), merged.read(name)) for name in anchor.tensors)
    one, other = merged.commit.progress, single.commit.progress
    assert one.positions == other.positions == {"0": STEPS * BATCH, "1": STEPS * BATCH}
    assert (one.consumed_samples, one.tokens) == (other.consumed_samples, other.tokens)
    assert merged.config.data.addresses.subtrees is None  # both of the two
    assert runs.read("part-1").config.data.addresses.subtrees == ("1",)


def test_with_weights_alone_only_the_state_of_other_blocks_is_new(runs):
    runs.train("afresh", start="part-0", subtrees=["1"])
    merged, single = stored(runs.read("merged")), stored(runs.read("afresh"))
    assert not [key for key in same(merged, single) if key.startswith("weight/")]
    rows = single["first_moment/layers.0.bank.level1"].view(2, -1)
    assert rows.any(dim=1).tolist() == [False, True]


def test_a_merged_run_goes_on_with_all_text(runs):
    """From the beginning of its order, as the run of one after the other does."""
    for name, steps in (("merged", STEPS), ("one-by-one", 2 * STEPS)):
        runs.train(f"{name}-all", resume=name, train__steps=steps + 2)
    merged, single = runs.read("merged-all"), runs.read("one-by-one-all")
    assert same(stored(merged), stored(single)) == []
    read = {"0": STEPS * BATCH, "1": STEPS * BATCH, "": 2 * BATCH}
    assert merged.commit.progress.positions == single.commit.progress.positions == read


@pytest.mark.full
def test_a_merged_run_goes_on_with_a_subtree_where_its_job_was(runs):
    runs.train("whole-part", start="anchor", subtrees=["0"], train__steps=2 * STEPS)
    runs.train("merged-0", resume="merged", subtrees=["0"], train__steps=2 * STEPS)
    whole, part = stored(runs.read("whole-part")), stored(runs.read("merged-0"))
    for key, values in whole.items():
        if ".bank." in key:
            rows = 2 if key.endswith("level1") else 4
            assert torch.equal(values.view(rows, -1)[: rows // 2], part[key].view(rows, -1)[: rows // 2]), key


def test_a_job_may_have_more_ranks(runs):
    runs.train("part-1-wide", world=2, start="anchor", subtrees=["1"], parallel={"pipeline": 1})
    runs.merge("merged-wide", "--from", "part-0", "--from", "part-1-wide")
    one, other = stored(runs.read("merged")), stored(runs.read("merged-wide"))
    for key, values in one.items():
        torch.testing.assert_close(other[key], values, rtol=0, atol=1e-5, msg=key)
    assert any(key.startswith("weight/") for key in same(one, other))
