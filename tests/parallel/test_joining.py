"""How ranks find each other and agree, as `kmem train` reports it when they do not: processes over gloo."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmem.config import ConfigError, parse_config
from kmem.parallel.joining import check_agreement, fields_of
from kmem.parallel.launch_environment import environment_rank
from kmem.parallel.local_launch import free_port
from tests.distributed.training_case import small_config
from tests.warm_processes import start_command

SECONDS = 3


@pytest.fixture
def end(run_config):
    """end(what differs of each rank) -> exit code and error of each rank of a `kmem train`, which must not train."""

    def run(*ranks, **changes):
        _, path = run_config(parallel__timeout_seconds=SECONDS, **changes)
        port, processes = str(free_port()), []
        for number, own in enumerate(ranks):
            environment = {"RANK": str(number), "WORLD_SIZE": str(len(ranks)), "MASTER_PORT": port, **own}
            words = environment.pop("words", [])
            environment |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
            known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            processes.append(start_command(["train", "--config", str(path), *words], known | environment))
        answers = []
        for process in processes:
            out, errors = process.communicate(timeout=150)
            assert "step 1/" not in out
            lines = [line for line in errors.splitlines() if line.startswith("kmem train: ")]
            assert len(lines) == 1, errors
            answers.append((process.returncode, lines[0]))
        return answers

    return run


def test_a_setting_that_differs_is_named_on_all_ranks(end):
    changed = {"words": ["--set", "train.optimizer.lr=0.5", "data.seed=7"]}
    for code, error in end({}, changed, {}, {}, train__optimizer={"lr": 0.25}):
        assert code == 2
        assert re.search(r"\bdata\.seed: \d+ on ranks 0, 2-3, 7 on rank 1\b", error)
        assert re.search(r"\btrain\.optimizer\.lr: 0\.25 on ranks 0, 2-3, 0\.5 on rank 1\b", error)


def test_a_world_of_two_sizes(end):
    for code, error in end({}, {"WORLD_SIZE": "3"}):
        assert code == 2
        assert re.search(r"\bWORLD_SIZE: 2 on rank 0, 3 on rank 1\b", error)


def test_a_rank_that_is_not_one(end):
    ((code, error),) = end({"RANK": "2"})
    assert code == 2
    assert re.search(r"\bRANK: 2\b.*\bWORLD_SIZE=1\b", error)
    ((code, error),) = end({"RANK": "first"})
    assert code == 2
    assert re.search(r"\bRANK: 'first'", error)


def test_another_port_is_told_within_the_timeout_on_both_sides(end):
    began = time.monotonic()
    (first, missing), (second, alone) = end({}, {"MASTER_PORT": str(free_port())})
    assert (first, second) == (2, 2)
    assert re.search(r"\bWORLD_SIZE: rank 1 of 2\b.*\bparallel\.timeout_seconds\b", missing)
    assert re.search(r"\bMASTER_PORT: rank 1 of 2\b.*\bparallel\.timeout_seconds\b", alone)
    assert time.monotonic() - began < 60


@pytest.mark.full
def test_two_processes_with_one_rank(end):
    answers = end({}, {"RANK": "1"}, {"RANK": "1"}, {"RANK": "1"})
    assert [code for code, _ in answers] == [2] * 4
    assert all(re.search(r"\bRANK: two processes\b.*\brank 1\b", error) for _, error in answers)


@pytest.mark.full
def test_a_port_in_use(end):
    (first, _), (second, _) = answers = end({}, {"RANK": "0"})
    assert (first, second) == (2, 2)
    assert sum(bool(re.search(r"\bMASTER_PORT: rank 0 cannot listen\b", error)) for _, error in answers) == 1


def joined_by(path, files):
    """A rank that joins and is gone; or `kmem train` with so many open files allowed."""
    program = (
        "import os; from kmem.config import load_config; from kmem.parallel.joining import join_mesh; "
        f"join_mesh(load_config({str(path)!r}, [])); os._exit(3)"
    )
    words = ["-c", program] if files is None else ["-m", "kmem.cli", "train", "--config", str(path)]
    limit = None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    return lambda environment: subprocess.Popen(
        [sys.executable, *words], env=environment, preexec_fn=limit, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.full
@pytest.mark.parametrize("files", [None, 34, 24])
def test_a_rank_lost_before_the_first_step(run_config, files):
    """Also while DeepSpeed makes its groups, for which 24 files do not suffice."""
    _, path = run_config(parallel__timeout_seconds=30)
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    first = start_command(["train", "--config", str(path)], shared | {"RANK": "0"})
    other = joined_by(path, files)(shared | {"RANK": "1"})
    _, errors = first.communicate(timeout=150)
    _, other_errors = other.communicate(timeout=150)
    assert first.returncode == 2
    assert re.search(r"^kmem train: error: before the first step: another rank is gone", errors, re.M), errors
    assert other.returncode == (3 if files is None else 2)
    assert files is None or re.search(r"^kmem train: rank 1: Too many open files: .*\bulimit -n\b", other_errors, re.M)


def facts_case(facts):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        check_agreement(facts[dist.get_rank()])
    except ConfigError as error:
        return str(error)
    return None


def test_facts_that_differ_or_are_missing_are_named_alike(ranks):
    same = {"a": 1, "b": None, "c": "x" * 64}
    assert ranks.run(4, facts_case, [same] * 4) == [None] * 4
    others = [same, {**same, "b": 2.5}, {**same, "b": 2.5}, {"a": 1, "c": "y" * 64}]
    (told,) = set(ranks.run(4, facts_case, others))
    assert told.startswith(
        'b: null on rank 0, 2.5 on ranks 1-2, missing on rank 3; c: "xxxxxxxxxxxx..." on ranks 0-2, '
    )
    many = [dict.fromkeys("abcdefgh", rank) for rank in (0, 1)]
    (told,) = set(ranks.run(2, facts_case, many))
    assert "e: 0 on rank 0, 1 on rank 1; and 3 more." in told
    assert "f:" not in told


def other_text_case(tree, folders):
    """Ranks whose data has another path, or another content behind the same path."""
    from kmem.data.reader import open_data
    from kmem.parallel.joining import join_mesh
    from kmem.train.trainer import Trainer

    os.chdir(folders[int(os.environ["RANK"])])
    config = parse_config(tree)
    try:
        Trainer(config, join_mesh(config), open_data(config.data, config.model.vocab_size))
    except ConfigError as error:
        return str(error)
    return None


def test_other_text_behind_the_same_path(ranks, corpus, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "text").symlink_to(corpus)
    other = tmp_path / "there" / "text"
    other.mkdir()
    for path in Path(corpus).iterdir():
        if path.name != "manifest.json":
            (other / path.name).symlink_to(path)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    tree = small_config(
        folder=str(tmp_path / "runs"), model__vocab_size=257, tracking={"wandb": "disabled"},
        data={"sources": [{"path": "text"}], "sequence_length": 32},
    )  # fmt: skip
    (told,) = set(ranks.run(2, other_text_case, tree, [str(tmp_path / name) for name in ("here", "there")]))
    assert re.match(r"data\.sources: .* on rank 0, .* on rank 1\b", told)


def slow_comparison_case(tree):
    """Train as the ranks of a launcher do; the first needs longer for its data than ranks wait for each other."""
    from kmem.data import reader, verified_files
    from kmem.train.command import _train

    digest = verified_files.file_digest

    def slowly(path):
        time.sleep(1.5)
        return digest(path)

    verified_files._verified, remembered = {("", 0, 0, "")}, verified_files._verified
    reader._SLOWEST_DISK, speed = 100.0, reader._SLOWEST_DISK  # bytes per second
    if os.environ["RANK"] == "0":
        verified_files.file_digest = slowly
    try:
        return _train(parse_config(tree), None)
    finally:
        verified_files.file_digest, verified_files._verified, reader._SLOWEST_DISK = digest, remembered, speed


@pytest.mark.full
def test_ranks_wait_while_the_first_compares_the_data(ranks, run_config):
    tree, _ = run_config(train__steps=1, parallel__timeout_seconds=4)
    assert ranks.run(2, slow_comparison_case, tree) == [0, 0]


def test_fields_have_dotted_names():
    fields = fields_of(parse_config(small_config()))
    assert fields["train.optimizer.lr"] == 0.01
    assert {"data.sequence_length", "parallel.pipeline", "model.attention.kind"} <= set(fields)
    assert not [value for value in fields.values() if isinstance(value, dict | list)]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "-1"}, r"^RANK\b"),
        ({"RANK": "1"}, r"^RANK\b"),
        ({"RANK": ""}, r"^RANK\b"),
        ({"WORLD_SIZE": "two"}, r"^WORLD_SIZE\b"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, r"^RANK\b"),
    ],
)
def test_variables_of_launchers_are_checked(monkeypatch, variables, named):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment_rank() == (0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        environment_rank()
