"""Small corpora whose tokens are bytes, so that tests can say what every sequence must hold."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kmem.config import AddressesConfig, DataConfig
from kmem.data.prepare import Preparation, prepare

BYTES_AND_EOS = 257  # a tokenizer without merges: one token per byte
WORDS = ["the", "state", "of", "a", "union", "is", "memory", "experts", "read", "tables", "naïve", "東京", "people"]


def make_texts(count: int, seed: int, longest: int = 40) -> list[str]:
    """Different texts of 1 to `longest` words."""
    draw = random.Random(seed)
    return [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for number in range(count)]


def with_addresses(
    config: DataConfig, tree: Path, batching: str = "packed", subtrees: Sequence[str] = ()
) -> DataConfig:
    """The same text with the addresses of a tree."""
    addresses = AddressesConfig(tree=str(tree), batching=batching, subtrees=subtrees or None)
    return config.model_copy(update={"addresses": addresses})


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_corpus(texts, **options) prepares them and returns the folder; equal calls give the same folder."""
    made: dict[str, Path] = {}

    def make(texts: list[str], **options: object) -> Path:
        key = repr((texts, sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("corpus")
            source = write_jsonl(folder / "texts.jsonl", texts)
            chosen = {"vocab_size": BYTES_AND_EOS, **options}
            if "tokenizer" in options:
                chosen["vocab_size"] = None
            prepare(Preparation(inputs=[source], out=folder / "prepared", **chosen))  # type: ignore[arg-type]
            made[key] = folder / "prepared"
        return made[key]

    return make
