"""Ranks of one run whose configurations differ in a field; commands that read a run while it writes and purges."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kmem.checkpoint.commit import committed_steps
from kmem.config import Config, ConfigError, load_config
from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare
from kmem.parallel.joining import fields_of
from kmem.parallel.local_launch import free_port
from tests.distributed.training_case import small_config
from tests.faults.outcomes import Ran, alone, failed, run
from tests.hf.models import TEXT, tokenizer

ENGRAM = {"layers": [1], "rows_per_head": 997, "heads": 2, "row_dim": 8}


def write_case(root: Path, **changes: Any) -> Path:
    """A prepared folder, and a configuration that trains on it; its file."""
    (root / "texts.txt").write_text("\n".join(f"{text} {number}" for number, text in enumerate(TEXT * 60)))
    reading = Reading(documents="line")
    prepare(Preparation(inputs=[root / "texts.txt"], out=root / "data", tokenizer=tokenizer(), reading=reading))
    tree = small_config(
        folder=str(root),
        name="run",
        model__vocab_size=512,
        model__engram=ENGRAM,
        data={"sources": [{"path": str(root / "data")}], "sequence_length": 32},
        train__schedule={"kind": "constant"},
        evaluation={"every": 50, "sequences": 4},
        tracking={"wandb": "disabled"},
        **changes,
    )
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


def disagreements(root: Path, seed: int) -> Iterator[tuple[str, str, str]]:
    """Two ranks, the second with another value of a field drawn from all numbers and switches, without end."""
    draw = random.Random(seed)
    path = write_case(root, train__steps=3, parallel__timeout_seconds=20)
    while True:
        field, value = another_value(path, draw)
        port, processes = str(free_port()), []
        for rank, words in enumerate(([], ["--set", f"{field}={value}"])):
            mesh = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            processes.append(alone(["train", "--config", str(path), *words], mesh | {"MASTER_PORT": port}))
        first, second = map(Ran.of, processes)
        if failed(first) or failed(second):
            outcome = "traceback"
        elif first.code == second.code == 2:
            outcome = "clean" if all(field in ran.said for ran in (first, second)) else "traceback"
        else:
            outcome = "silent"
        yield "ranks that differ", f"{field}={value} on rank 1", outcome


def another_value(path: Path, draw: random.Random) -> tuple[str, str]:
    """A field, and a value that another configuration may have."""
    fields = [(name, value) for name, value in fields_of(load_config(path)).items() if isinstance(value, int | float)]
    while True:
        name, value = draw.choice(fields)
        other = str(not value).lower() if isinstance(value, bool) else str(value * 2 or 1)
        try:
            config = load_config(path, [f"{name}={other}"])
        except ConfigError:
            continue
        if _runs(config):
            return name, other


def _runs(config: Config) -> bool:
    """Whether two ranks could train it."""
    try:
        config.data_parallel_size(2)
    except ConfigError:
        return False
    return True


def beside(root: Path, seed: int) -> Iterator[tuple[str, str, str]]:
    """Readers of a run that saves and purges at every step, without end."""
    draw = random.Random(seed)
    path = write_case(root, train__steps=60, checkpoint={"every": 1, "keep_last": 1})
    readers = (
        ("generate", "--prompt", "the", "--max-new-tokens", "4", "--checkpoint", str(root / "run")),
        ("eval", "--json", "--sequences", "2", "--checkpoint", str(root / "run")),
        ("engram", "list", "--json", "--checkpoint", str(root / "run")),
        ("verify", str(root / "run")),
    )
    for number in range(1_000_000):
        process = alone(["train", "--config", str(path), "--set", f"train.init_seed={number}"])
        while process.returncode is None:
            if not committed_steps(root / "run" / "checkpoints"):
                time.sleep(0.01)
                continue
            words = draw.choice(readers)
            ran = run(words)
            yield (
                f"run in progress, {words[0]}",
                "saves and purges",
                ("traceback" if failed(ran) else "stuck" if ran.code else "same"),
            )
        assert Ran.of(process).code == 0
        os.rename(root / "run", root / f"run-{number}")
