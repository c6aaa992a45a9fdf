"""Jobs that train the text of different subtrees with one frozen anchor: merged, they are the run that trains one
subtree after the other."""

import contextlib
import io
import json
import re
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import yaml

from kmem.checkpoint.bank.hits import last_step_name, stored_hits
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.config import ConfigError, parse_config
from kmem.data.reader import SequenceReader
from tests.clustering.cluster_case import give_addresses, write_tree
from tests.distributed.training_case import small_config
from tests.small_corpora import with_addresses
from tests.train.test_command import KMEM, run
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
            model__bank=BANK,
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
        assert main(["bank", "merge", *words, "--out", str(self.root / name)]) == 0

    def names(self):
        return [path.name for path in self.root.iterdir()]

    def read(self, name):
        return CheckpointReader(self.root / name)


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory):
    """An anchor, two jobs that begin with its weights, and their merge; and the run of one job after the other."""
    made = Runs(ranks, corpus, tmp_path_factory.mktemp("jobs"))
    made.train("anchor", model__bank=None, data__addresses=None)
    for number in ("0", "1"):
        made.train(f"part-{number}", start="anchor", subtrees=[number])
    made.train("one-by-one", resume="part-0", subtrees=["1"], train__steps=2 * STEPS)
    made.merge("merged", "--from", "part-0", "--from", "part-1")
    return made


def stored(reader):
    """All that a checkpoint holds of its tensors, but for how many steps each table made, which is that of one job."""
    parts = {key: key.partition("/") for key in reader.commit.tensors}
    keys = [key for key, (array, _, name) in parts.items() if name in reader.tensors and array != "step"]
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


def test_a_merged_run_has_the_usage_of_all(runs):
    """Tokens by leaf are those of the run of one subtree after the other; ages are those that blocks had in their own
    run."""
    merged, single, parts = runs.read("merged"), runs.read("one-by-one"), [runs.read("part-0"), runs.read("part-1")]
    hits = stored_hits(merged)
    assert (hits[:-1] > 0).all()
    assert torch.equal(hits, stored_hits(single))
    for level in (1, 2):
        size = 2**level
        halves = [part.read_stored(last_step_name(level), 0, size).chunk(2)[own] for own, part in enumerate(parts)]
        assert torch.equal(merged.read_stored(last_step_name(level), 0, size), torch.cat(halves))


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


@pytest.mark.full
def test_a_job_may_have_more_ranks(runs):
    runs.train("part-1-wide", world=2, start="anchor", subtrees=["1"], parallel={"pipeline": 1})
    runs.merge("merged-wide", "--from", "part-0", "--from", "part-1-wide")
    one, other = stored(runs.read("merged")), stored(runs.read("merged-wide"))
    for key, values in one.items():
        torch.testing.assert_close(other[key], values, rtol=0, atol=1e-5, msg=key)
    assert any(key.startswith("weight/") for key in same(one, other))


@pytest.mark.parametrize(
    ("name", "begin", "source"),
    [
        ("second", "start", "merged"),
        pytest.param("going-on", "resume", "merged", marks=pytest.mark.full),
        pytest.param("third", "resume", "begun", marks=pytest.mark.full),  # which began with another bank itself
    ],
)
def test_jobs_of_a_trained_bank_name_what_they_began_with(runs, name, begin, source, capsys):
    """Else what they have not trained themselves would be taken for theirs."""
    if source == "begun":
        runs.train("begun", start="merged")
    first = STEPS if begin == "resume" else 0
    for number in ("0", "1"):
        runs.train(f"{name}-{number}", **{begin: source}, subtrees=[number], train__steps=first + 1)
    runs.train(f"{name}-both", resume=f"{name}-0", subtrees=["1"], train__steps=first + 2)
    parts = ["--from", str(runs.root / f"{name}-0"), "--from", str(runs.root / f"{name}-1")]
    capsys.readouterr()
    assert main(["bank", "merge", *parts, "--out", str(runs.root / "never")]) == 2
    assert "with --start" in " ".join(capsys.readouterr().err.split())
    runs.merge(f"{name}-merged", *parts, "--start", source)
    merged, single = runs.read(f"{name}-merged"), runs.read(f"{name}-both")
    assert same(stored(merged), stored(single)) == []
    one, other = merged.commit.progress, single.commit.progress
    assert (one.positions, one.tokens, one.consumed_samples) == (other.positions, other.tokens, other.consumed_samples)
    assert torch.equal(stored_hits(merged), stored_hits(single))


def test_generic_blocks_are_those_of_the_run_that_is_named(runs, capsys):
    """Every job trains them, and they belong to no subtree."""
    for number in ("0", "1"):
        generic = {"probability": 0.4, "per": "sequence"}
        runs.train(f"generic-{number}", start="anchor", subtrees=[number], model__bank__generic=generic)
    parts = ["--from", "generic-0", "--from", "generic-1"]
    capsys.readouterr()
    runs.merge("generic-none", *parts)
    assert re.search(r"\b2 clusters .*\b1, left out: generic, generic", capsys.readouterr().out)
    runs.merge("generic-named", "--from", "generic-0", "0", "generic", "--from", "generic-1")
    name = "layers.1.bank.level1"
    none, named, first = (runs.read(run).read(name) for run in ("generic-none", "generic-named", "generic-0"))
    assert torch.equal(named[-1], first[-1])
    assert not torch.equal(none[-1], first[-1])
    assert torch.equal(none[:-1], named[:-1])


def test_a_run_says_which_text_it_reads(runs):
    """Its epochs and its evaluation are of the chosen subtrees, which need no held-out text."""
    said = runs.train("said", start="anchor", subtrees=["1.0", "0"], train__steps=1)["printed"]
    found = re.search(r"subtrees 0,1\.0: (\d+) sequences .* (\d+) held-out", said)
    assert found
    config = with_addresses(parse_config(runs.config("said")).data, runs.root / "tree", "leaf", ("0", "1.0"))
    lengths = [len(SequenceReader(config, split)) for split in ("train", "validation")]
    assert [int(count) for count in found.groups()] == lengths
    held_out = np.load(runs.root / "prepared" / "validation.addresses.npy")
    other = runs.root / "without"
    shutil.copytree(runs.root / "prepared", other)
    give_addresses(other, runs.root / "tree", held_out=np.zeros_like(held_out))
    data = {"data__sources": [{"path": str(other)}]}
    said = runs.train("unseen", start="anchor", subtrees=["1"], train__steps=1, **data)["printed"]
    assert "not evaluated" in said
    assert "held_out" not in runs.read("unseen").facts


HELD = {"bank__hold": "subtrees"}


def elements(reader):
    """How many the checkpoint holds of each tensor."""
    return {key: sum(length for _, length, _ in found.chunks) for key, found in reader.commit.tensors.items()}


def refused(*words):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        assert main([str(word) for word in words]) == 2
    return " ".join(out.getvalue().split())


def test_jobs_that_hold_their_blocks_alone_are_those_that_hold_all(runs):
    """Merged to the last bit, blocks that no job had included; each checkpoint is smaller by the blocks of the
    others."""
    for number, store in (("0", "host"), ("1.1", "mmap")):
        runs.train(f"held-{number}", start="anchor", subtrees=[number], bank__store=store, **HELD)
    runs.train("part-1.1", start="anchor", subtrees=["1.1"])
    whole, held = elements(runs.read("part-1.1")), elements(runs.read("held-1.1"))
    for key, count in whole.items():
        rows = 2 if "level1" in key else 4
        assert held[key] == (count // rows if "level" in key and not key.startswith("step/") else count), key
    runs.merge("merged-held", "--from", "held-0", "--from", "held-1.1")
    runs.merge("merged-parts", "--from", "part-0", "--from", "part-1.1")
    one, other = runs.read("merged-held"), runs.read("merged-parts")
    assert elements(one) == elements(other)
    assert same(stored(one), stored(other)) == []
    assert torch.equal(stored_hits(one), stored_hits(other))
    assert one.config.bank.hold == "all"
    one.verify()
    runs.train("after-held", resume="merged-held", subtrees=["1"], train__steps=STEPS + 1)


def test_a_job_that_holds_its_blocks_goes_on_with_more_ranks_and_stages(runs):
    for name, options in (("held-one", {}), ("held-many", {"world": 2, "parallel": {"pipeline": 1}})):
        runs.train(name, start="anchor", subtrees=["1"], train__steps=1, **HELD, **options)
    both = {"world": 2, "parallel": {"pipeline": 2}, "subtrees": ["1"], "train__steps": 2}
    for name in ("held-one", "held-many"):
        assert runs.train(name, **both, **HELD)["started_at"] == 1
    one, other = (stored_held(runs.read(name)) for name in ("held-one", "held-many"))
    for key, values in one.items():
        torch.testing.assert_close(other[key], values, rtol=0, atol=1e-5, msg=key)


def stored_held(reader):
    keys = [key for key in reader.commit.tensors if ".bank." in key and not key.startswith("step/")]
    return {key: reader.read_stored(key, 0, reader.commit.tensors[key].size, absent=0) for key in keys}


@pytest.mark.parametrize("begin", ["start", "resume"])
def test_jobs_of_a_trained_bank_that_hold_their_blocks(runs, begin):
    """The blocks of the other clusters are those of what they began with, which the merge must be given."""
    first = STEPS if begin == "resume" else 0
    for end, held in (("", {}), ("-held", HELD)):
        for number in ("0", "1"):
            begun = {begin: "merged", "subtrees": [number], "train__steps": first + 1}
            runs.train(f"{begin}-{number}{end}", **begun, **held)
    parts = [word for number in ("0", "1.1") for word in ("--from", f"{begin}-{number[0]}-held", number)]
    assert "--start" in refused("bank", "merge", *paths(runs, parts), "--out", runs.root / "never")
    runs.merge(f"{begin}-merged-held", *parts, "--start", "merged")
    runs.merge(f"{begin}-merged", *[word.removesuffix("-held") for word in parts], "--start", "merged")
    one, other = runs.read(f"{begin}-merged-held"), runs.read(f"{begin}-merged")
    assert same(stored(one), stored(other)) == []
    assert torch.equal(stored_hits(one), stored_hits(other))


def paths(runs, words):
    return [runs.root / word if word in runs.names() else word for word in words]


def test_what_holds_a_part_is_refused_where_all_is_needed(runs, capsys):
    runs.train("a-part", start="anchor", subtrees=["0"], train__steps=1, **HELD)
    part = runs.root / "a-part"
    for words in (
        ["eval", "--checkpoint", part],
        ["export", "--checkpoint", part, "--out", runs.root / "exported"],
        ["bank", "erase", "0", "--checkpoint", part, "--out", runs.root / "erased"],
        ["generate", "--checkpoint", part, "--prompt", "a"],
    ):
        assert "kmem bank merge" in refused(*words)
    assert not (runs.root / "exported").exists()

    def problem(name, **changes):
        (answer,) = runs._ranks.run(1, trainer_case, runs.config(name, **changes))
        return answer["error"]

    assert re.match(r"bank\.hold: .*kmem bank merge", problem("of-a-part", start="a-part", subtrees=["1"], **HELD))
    assert re.match(r"bank\.hold: .*kmem bank merge", problem("a-part", subtrees=["0"], train__steps=2))
    more = problem("part-0", subtrees=["0"], train__steps=STEPS + 1, **HELD)
    assert re.match(r"bank\.hold: .*checkpoint\.resume or checkpoint\.start\b.*data\.addresses\.subtrees", more)
    with pytest.raises(ConfigError, match=r"bank\.hold=subtrees\b.*data\.addresses\.subtrees\b"):
        parse_config(runs.config("no-subtrees", start="anchor", **HELD))
    capsys.readouterr()
    assert main(["bank", "list", "0", "--checkpoint", str(part)]) == 0
    assert "only the blocks of the subtrees 0;" in " ".join(capsys.readouterr().out.split())


@pytest.mark.full
def test_the_commands_of_the_documentation(runs, tmp_path):
    """As processes: an anchor, two jobs of which one has two ranks, their merge, and all text after it."""
    anchor = runs.config("the-anchor", model__bank=None, data__addresses=None)
    frozen = runs.config("frozen", start="the-anchor", train__schedule={"kind": "cosine", "warmup_steps": 1})
    for name, tree in (("anchor", anchor), ("frozen", frozen)):
        tree["folder"] = str(tmp_path)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def kmem(*words):
        done = run([*KMEM, *map(str, words)])
        assert done.returncode == 0, done.stderr
        return done.stdout

    kmem("train", "--config", tmp_path / "anchor.yaml")
    job = ["train", "--config", tmp_path / "frozen.yaml", "--set", f"checkpoint.start={tmp_path}/the-anchor"]
    for number in (0, 1):
        kmem(*job, f"name=part-{number}", f'data.addresses.subtrees=["{number}"]')
    kmem(*job, "name=part-1-wide", "data.addresses.subtrees=[1]", "--nproc", 2)
    begin = f"checkpoint.start={tmp_path}/part-0"
    kmem(*job, "name=single", "data.addresses.subtrees=[1]", begin)
    for end in ("", "-wide"):
        parts = ["--from", tmp_path / "part-0", "--from", tmp_path / f"part-1{end}"]
        kmem("bank", "merge", *parts, "--out", tmp_path / f"merged{end}")
    merged, wide, single = (stored(CheckpointReader(tmp_path / name)) for name in ("merged", "merged-wide", "single"))
    assert not [key for key in same(merged, single) if key.startswith("weight/")]
    for key, values in merged.items():
        torch.testing.assert_close(wide[key], values, rtol=0, atol=1e-5, msg=key)
    everything = ["name=everything", f"checkpoint.start={tmp_path}/merged", "model.bank.anchor=train"]
    said = kmem("train", "--config", tmp_path / "frozen.yaml", "--set", *everything)
    assert "from the start" in said
    assert "bits per byte" in kmem("eval", "--checkpoint", tmp_path / "everything")


@pytest.mark.parametrize("bank", [None, BANK], ids=["plain", "bank"])
def test_eval_scores_all_held_out_text(runs, bank, capsys):
    name = "plain-part" if bank is None else "part-0"
    if bank is None:
        runs.train(name, model__bank=None, subtrees=["0"], train__steps=1)
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(runs.root / name), "--json"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)["held_out"].values()
    config = parse_config(runs.config("any")).data
    reader = SequenceReader(with_addresses(config, runs.root / "tree", "leaf"), "validation")
    assert figures["tokens"] == int((reader.read(range(len(reader))).labels >= 0).sum())
