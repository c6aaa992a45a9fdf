"""A small prepared corpus and a configuration that trains on it in seconds."""

import random
from pathlib import Path

import pytest
import yaml

from kmem.data.prepare import Preparation, prepare
from tests.distributed.training_case import small_config

WORDS = ["the", "state", "of", "a", "union", "memory", "experts", "read", "tables", "people", "know", "when"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared corpus of 200 short documents; one token per byte."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "." for _ in range(200)]
    (folder / "texts.txt").write_text("\n".join(texts))
    from kmem.data.documents import Reading

    prepare(
        Preparation(
            inputs=[folder / "texts.txt"], out=folder / "prepared", vocab_size=257, reading=Reading(documents="line")
        )
    )
    return folder / "prepared"


@pytest.fixture
def run_config(corpus, tmp_path):
    """run_config(**dotted changes) -> (tree, path of its YAML file); the run folder is below tmp_path."""

    def make(**changes):
        tree = small_config(
            folder=str(tmp_path / "runs"),
            model__vocab_size=257,
            data={"sources": [{"path": str(corpus)}], "sequence_length": 32},
            train__steps=6,
            train__schedule={"kind": "constant"},
            evaluation={"every": 3, "sequences": 6},
            checkpoint={"every": 2},
            tracking={"wandb": "disabled"},
        )
        for path, value in changes.items():
            *parents, leaf = path.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return tree, path

    return make
