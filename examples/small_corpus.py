"""A prepared corpus of made-up sentences, one token per byte, and a model that is trained on it in seconds."""

import random
from pathlib import Path
from typing import Any

from kmem.data.documents import Reading
from kmem.data.prepare import Preparation, prepare

WORDS = ["the", "state", "of", "a", "union", "memory", "experts", "read", "tables", "people", "know", "when"]


def small_corpus(folder: Path) -> Path:
    """Write 200 short documents and prepare them, as `kmem data prepare` does; the folder that a run reads."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "." for _ in range(200)]
    (folder / "texts.txt").write_text("\n".join(texts))
    prepare(
        Preparation(
            inputs=[folder / "texts.txt"],
            out=folder / "prepared",
            vocab_size=257,  # a token per byte, and the end of text
            reading=Reading(documents="line"),
        )
    )
    return folder / "prepared"


def small_run(folder: Path, corpus: Path, steps: int) -> dict[str, Any]:
    """The configuration of a dense model of two layers, as a YAML file would have it."""
    return {
        "name": "example",
        "folder": str(folder / "runs"),
        "model": {
            "vocab_size": 257,
            "hidden_size": 32,
            "num_layers": 2,
            "intermediate_size": 64,
            "attention": {"num_heads": 4},
        },
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 32},
        "train": {
            "steps": steps,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "optimizer": {"lr": 0.01},
            "schedule": {"kind": "constant"},
        },
        "tracking": {"wandb": "disabled"},
    }
