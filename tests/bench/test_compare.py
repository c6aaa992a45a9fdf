"""`kmem bench compare`: fair or refused, resumable, and reported."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kmem.bench import compare_runs
from kmem.bench.compare import (
    PreparedText,
    check_fairness,
    ensure_data,
    find_comparisons,
    load_comparison,
    measure,
    plan,
)
from kmem.cli import main
from kmem.config import ConfigError, load_config
from kmem.config.load import config_folders
from kmem.data.bank_addresses import stored_tree
from kmem.data.documents import Reading
from kmem.data.manifest import read_manifest
from kmem.data.prepare import Preparation, prepare
from kmem.model.bank_tree import ClusterTree

WORDS = ["the", "state", "of", "a", "union", "memory", "experts", "read", "tables", "people", "know", "when"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "." for _ in range(100)]
    (folder / "text.txt").write_text("\n".join(lines))
    prepare(Preparation([folder / "text.txt"], folder / "data", vocab_size=257, reading=Reading(documents="line")))
    return folder / "data"


@pytest.fixture
def comparison(prepared, tmp_path):
    """A folder with two models of equal size; compare.yaml takes changes."""

    def write(**changes):
        folder = tmp_path / "tiny"
        folder.mkdir(exist_ok=True)
        tree = {
            "title": "tiny",
            "question": "Does it run?",
            "data": {"folder": str(prepared), "corpora": ["none"], "vocab_size": 257},
            "seeds": [1, 2],
            "contestants": {"moe": "moe.yaml", "engram": "engram.yaml"},
            "baseline": "moe",
            "pairs": {"engram": "moe"},
            "equal": {"non_embedding": 0.05, "active_non_embedding": 0.05, "tokens": 0},
            "controls": ["engram=off", "engram=shuffled", "engram=single-row"],
            "horizons": [2],
        }
        (folder / "compare.yaml").write_text(yaml.safe_dump(tree | changes, sort_keys=False))
        moe = {
            "name": "moe",
            "model": {
                "vocab_size": 257,
                "hidden_size": 32,
                "num_layers": 2,
                "attention": {"num_heads": 2},
                "moe": {"num_experts": 8, "top_k": 1, "intermediate_size": 24},
            },
            "data": {"sources": [{"path": str(prepared)}], "sequence_length": 32},
            "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "optimizer": {"lr": 0.01}},
            "evaluation": {"every": 2, "sequences": 4},
            "checkpoint": {"every": 2},
            "tracking": {"wandb": "disabled"},
        }
        memory = {"layers": [1], "heads": 1, "row_dim": 8, "rows_per_head": 890, "bias": False, "conv_kernel": 0}
        engram = {
            "include": "moe.yaml",
            "name": "engram",
            "model": {"moe": {"num_experts": 7, "intermediate_size": 16}, "engram": memory},
        }
        (folder / "moe.yaml").write_text(yaml.safe_dump(moe))
        (folder / "engram.yaml").write_text(yaml.safe_dump(engram))
        return folder

    return write


def command_case(words):
    """Run a command as this rank; its exit code."""
    return main(words)


@pytest.fixture
def warm_runs(ranks, monkeypatch):
    """Runs train in a rank process that has imported everything, in place of a new process each."""
    monkeypatch.setattr(compare_runs, "launch_local", lambda words, count: ranks.run(count, command_case, words)[0])


@pytest.mark.usefixtures("warm_runs")
def test_a_comparison_is_trained_evaluated_and_reported_once(comparison, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["bench", "compare", str(comparison()), "--out", str(out), "--seeds", "1"]
    assert main(command) == 0
    results = json.loads((out / "report.json").read_text())
    assert results["departures"] == ["1 of 2 seeds"]
    engram, moe = (results["contestants"][label] for label in ("engram", "moe"))
    difference = engram["bits_per_byte"]["mean"] - moe["bits_per_byte"]["mean"]
    assert engram["difference"] == {"values": [difference], "mean": difference, "std": None}
    assert engram["size"]["tokens"] == 4 * 4 * 32
    assert engram["difference_to"]["moe"]["whole"] == engram["difference"]
    early = engram["runs"]["1"]["held_out"]["2"] - moe["runs"]["1"]["held_out"]["2"]
    assert engram["difference_to"]["moe"]["2"]["mean"] == early
    assert set(engram["runs"]["1"]["states"]) == {"trained", "engram=off", "engram=shuffled", "engram=single-row"}
    assert set(moe["runs"]["1"]["states"]) == {"trained"}
    assert (out / "report.png").stat().st_size > 10_000
    text = (out / "report.md").read_text()
    assert "1 of 2 seeds" in text
    assert f"| engram | {engram['bits_per_byte']['mean']:.4f} |" in text
    capsys.readouterr()

    monkeypatch.setattr(compare_runs, "launch_local", None)  # nothing is left to train
    assert main(command) == 0
    assert capsys.readouterr().out.count("is finished") == 2
    assert json.loads((out / "report.json").read_text()) == results


@pytest.mark.usefixtures("warm_runs")
def test_banks_are_evaluated_by_what_contexts_fetch_and_asked_questions(comparison, prepared, tmp_path, capsys):
    """A bank with fetched and generic blocks, one with generic blocks only, and a model without."""
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    bank = {"children": 2, "levels": [4, 2], "generic": {"probability": 0.5}}
    text = {"sources": [{"path": str(data)}], "addresses": {"tree": str(data / "tree")}}
    folder = comparison(
        data={
            "folder": str(data), "corpora": ["none"], "vocab_size": 257,
            "tree": {"children": 2, "levels": 2},
        },
        contestants={"moe": "moe.yaml", "bank": "bank.yaml", "generic": "generic.yaml"},
        equal={"tokens": 0}, pairs={}, controls=["bank=generic", "bank=blocked", "bank=none"],
    )  # fmt: skip
    for name, changes in (
        ("moe", {"include": "plain.yaml", "data": {"sources": [{"path": str(data)}]}}),
        ("bank", {"include": "moe.yaml", "model": {"bank": bank}, "data": text}),
        ("generic", {"include": "bank.yaml", "model": {"bank": {"generic": {"probability": 1.0}}}}),
    ):
        if name == "moe":
            (folder / "moe.yaml").rename(folder / "plain.yaml")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name} | changes))
    out = tmp_path / "out"
    command = ["bench", "compare", str(folder), "--out", str(out), "--seeds", "1"]
    assert main(command) == 0
    results = json.loads((out / "report.json").read_text())
    found = {label: contestant["runs"]["1"]["states"] for label, contestant in results["contestants"].items()}
    assert {label: list(own) for label, own in found.items()} == {
        "moe": ["trained"],
        "bank": ["trained", "bank=generic", "bank=blocked", "bank=none"],
        "generic": ["trained", "bank=none"],
    }
    assert len({figures["loss"] for figures in found["bank"].values()}) == 4, "the blocks are not the same"
    assert results["contestants"]["generic"]["bits_per_byte"]["mean"] == found["generic"]["trained"]["bits_per_byte"]
    assert "| contestant | trained | bank=generic | bank=blocked | bank=none |" in (out / "report.md").read_text()

    # Questions that are asked later are answered by the evaluated runs.
    told = yaml.safe_load((folder / "compare.yaml").read_text())
    (folder / "compare.yaml").write_text(yaml.safe_dump(told | {"questions": True}))
    assert main(command) == 2
    assert f"questions: {data / 'none.questions'} " in capsys.readouterr().err
    known = {"prompt": "the state of", "answer": " a", "exposures": 3}
    (data / "none.questions").write_text("\n".join(json.dumps(known | {"exposures": n}) for n in (1, 3, 90)))
    assert main(command) == 0
    again = json.loads((out / "report.json").read_text())["contestants"]["bank"]["runs"]["1"]["states"]
    asked = {state: figures.pop("questions") for state, figures in again.items()}
    assert again == found["bank"]
    assert all([group["group"] for group in groups] == ["1", "2-3", "64+", "all"] for groups in asked.values())
    text = (out / "report.md").read_text()
    assert "| contestant | 1 | 2-3 | 64+ | all |" in text
    assert all(f"| {name} |" in text for name in ("moe", "bank, trained", "bank, bank=blocked", "generic, trained"))


def test_an_interrupted_run_goes_on(comparison, tmp_path, monkeypatch, capsys):
    """After the first run stopped early, the same command continues it; nothing else has been started."""
    started = []

    def stopping(words, _ranks):
        started.append(words)
        return 0  # as `kmem train` does that was interrupted: no checkpoint of the last step

    monkeypatch.setattr(compare_runs, "launch_local", stopping)
    command = ["bench", "compare", str(comparison()), "--out", str(tmp_path / "out")]
    assert main(command) == 130
    assert main(command) == 130
    assert started[0] == started[1]
    assert "name=moe-seed1" in started[0]
    assert "interrupted: " in capsys.readouterr().out


def test_unequal_contestants_are_refused_with_the_numbers(comparison, tmp_path, capsys):
    command = ["bench", "compare", str(comparison(equal={"non_embedding": 0.0})), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    told = r"engram: non_embedding .*\b45,936, \+0\.45% .*\b45,728 .*\bmoe\b.*\b0\.00%"
    assert re.search(told, capsys.readouterr().err)
    comparison()
    assert main([*command, "--set", "model.moe.num_experts=4"]) == 2
    assert "engram: non_embedding " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_quantity_is_held_to_its_tolerance(comparison):
    folder = comparison()
    size = measure(load_config(folder / "moe.yaml"))
    told = load_comparison(comparison(equal={"tokens": 0, "expert_calls": 0.05}))
    check_fairness(told, {"moe": size, "engram": replace(size, expert_calls=size.expert_calls, total=1)})
    with pytest.raises(ConfigError, match=r"engram: tokens .*\b513, \+0\.20% .*\b512 .*\bmoe\b"):
        check_fairness(told, {"moe": size, "engram": replace(size, tokens=513)})


def test_expert_calls_count_iterations_and_shared_experts(comparison):
    file = comparison() / "moe.yaml"
    shared = ["model.moe.top_k=2", "model.moe.num_shared_experts=1"]
    chain = "model.moe.chain={iterations: 3}"
    once = "model.moe.chain={iterations: 3, shared_experts: once}"
    calls = [measure(load_config(file, [*shared, *extra])).expert_calls for extra in ([], [chain], [once])]
    assert calls == [2 * 3, 2 * 9, 2 * 7]


def test_seeds_change_weights_and_order_and_nothing_else(comparison, tmp_path):
    folder = comparison()
    first, _, second, _ = (run.config for run in plan(load_comparison(folder), folder, tmp_path, [1, 2]))
    assert (second.train.init_seed, second.data.seed, second.name) == (2, 2, "moe-seed2")
    same = second.model_copy(update={"name": first.name})
    same = same.model_copy(update={"train": same.train.model_copy(update={"init_seed": 1})})
    assert same.model_copy(update={"data": same.data.model_copy(update={"seed": 1})}) == first


def test_contestants_name_the_size_of_their_vocabulary(comparison, tmp_path):
    folder = comparison()
    with pytest.raises(ConfigError, match=r"moe\.yaml: model\.vocab_size: .*\b257\b"):
        plan(load_comparison(folder), folder, tmp_path, [1], ["model.vocab_size=null"])


def test_runs_of_another_configuration_are_not_taken_over(comparison, tmp_path, capsys):
    folder, out = comparison(), tmp_path / "out"
    (run, *_) = plan(load_comparison(folder), folder, out, [1], ["train.steps=8"])
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    assert main(["bench", "compare", str(folder), "--out", str(out)]) == 2
    assert re.search(r"moe-seed1: .*\btrain\.steps=8\b.*\b4\b", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "dense"}, r"compare\.yaml: .*baseline=dense\b.*moe, engram"),
        ({"seeds": [1, 1]}, r"compare\.yaml: .*seeds=\[1, 1\].*twice"),
        ({"pairs": {"engram": "dense"}}, r"compare\.yaml: .*pairs={engram: dense} .*moe, engram"),
        ({"equal": {"speed": 0}}, r"compare\.yaml: equal\.speed\b"),
        ({"title": None}, r"compare\.yaml: title: "),
        ({"horizons": [3]}, r"moe\.yaml: evaluation\.every: 2\b.*step 3\b.*horizons"),
        (
            {"data": {"folder": "other", "corpora": ["wiki"], "vocab_size": 257}},
            r"moe\.yaml: data\.sources: .*\bother \(data\b",
        ),
    ],
)
def test_what_a_comparison_cannot_mean_is_refused(comparison, changes, message, capsys):
    assert main(["bench", "compare", str(comparison(**changes)), "--check"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_unknown_names_list_what_there_is(comparison, tmp_path, capsys):
    assert main(["bench", "compare", "engram-vs-mow"]) == 2
    assert "engram-vs-moe" in capsys.readouterr().err
    folder = comparison()
    shutil.copytree(folder, folder / "inner")
    assert find_comparisons(folder) == [folder, folder / "inner"]
    assert main(["bench", "compare", str(folder), "--out", str(tmp_path)]) == 2


def test_the_packaged_comparisons_are_fair():
    (root,) = (folder / "compare" for folder in config_folders())
    folders = find_comparisons(root)
    assert folders
    for folder in folders:
        told = load_comparison(folder)
        runs = plan(told, folder, root, told.seeds)
        check_fairness(told, {run.label: measure(run.config) for run in runs})


def test_text_by_corpus_has_one_tokenizer_and_one_tree(tmp_path, monkeypatch, capsys):
    draw = random.Random(0)
    asked = []

    def write(names, out, _cache):
        asked.append(tuple(names))
        out.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            words = [word + "ab"[number] for word in WORDS]
            lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 40)))}) for _ in range(60)]
            (out / f"{name}.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr("kmem.corpora.catalogue.extract_corpora", write)
    folder = tmp_path / "data"
    text = PreparedText.model_validate(
        {"folder": str(folder), "corpora": ["wiki", "sotu"], "vocab_size": 300, "by_corpus": True,
         "tree": {"children": 2, "levels": 2}}
    )  # fmt: skip

    class Cut(Exception):
        pass

    def cut(preparation):
        if preparation.out.name == "sotu":
            raise Cut
        return prepare(preparation)

    with monkeypatch.context() as patch:
        patch.setattr("kmem.data.prepare.prepare", cut)
        with pytest.raises(Cut):
            ensure_data(text)
    ensure_data(text)  # goes on with what is there
    assert text.sources == [str(folder / "wiki"), str(folder / "sotu")]
    manifests = [read_manifest(Path(source)) for source in text.sources]
    assert manifests[0].tokenizer.fingerprint == manifests[1].tokenizer.fingerprint
    assert stored_tree(folder / "wiki") == stored_tree(folder / "sotu") == ClusterTree.load(folder / "tree").fingerprint
    assert not (tmp_path / "data-text").exists()
    ensure_data(text)
    assert len(asked) == 2, "what is there is not made again"
    other = text.model_copy(update={"tree": text.tree.model_copy(update={"levels": 3})})
    with pytest.raises(ConfigError, match=r"data/tree: .*\b2 levels of 2 children\b.*compare\.yaml"):
        ensure_data(other)


def test_figures_of_several_sources_are_those_of_all_their_text():
    one = {"bits_per_byte": 1.0, "loss": 2.0, "tokens": 100, "perplexity": math.exp(2)}
    other = {"bits_per_byte": 3.0, "loss": 3.0, "tokens": 50, "perplexity": math.exp(3)}
    whole = compare_runs._whole({"data/one": one, "data/other": other})
    assert whole["loss"] == pytest.approx((2.0 * 100 + 3.0 * 50) / 150)
    # 200 nats at 1 bit a byte, 150 nats at 3.
    assert whole["bits_per_byte"] == pytest.approx(350 / (200 + 50))
    assert whole["sources"] == {"one": one, "other": other}
    assert compare_runs._whole({"data/one": one}) == one
