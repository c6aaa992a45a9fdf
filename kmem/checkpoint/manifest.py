"""Rows are meaningless without their addressing: every load compares the checkpoint's addressing with the model's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kmem.checkpoint.pieces import CheckpointError
from kmem.model.engram_ngrams import differences
from kmem.model.engram_reader import EngramAddresses

REASONS = {
    "tokenizer_fingerprint": "The tokenizer differs: use the one that the run was trained with",
    "compression_digest": "The vocabulary is compressed differently: use the tokenizer, and the version of the "
    "tokenizers library, that the run was trained with",
    "sizes": "The number of rows per head sets the prime of every hash, so a table of another size keeps no address: "
    "a table cannot grow",
    "tokenizer": "Its embedder counts token ids of another tokenizer",
    "files": "Its centroids differ, so a leaf holds other documents",
    "embedder": "Its embedder differs, so a leaf holds other documents",
    "unit": "Its addresses belong to another unit of text",
}
"""Field of an addressing or of a tree.json -> why it matters."""
ANOTHER_RUN = "start a run under another name"
"""The remedy that always works for a checkpoint in the run's own folder."""


def check_addressing(folder: Path, stored: Mapping[str, Any], used: EngramAddresses, hint: str = ANOTHER_RUN) -> None:
    """Refuse rows that were trained with another addressing.

    Args:
        hint: remedy for a user who means another model.

    Raises:
        CheckpointError: names every field that differs, and why it matters.
    """
    here = used.addressing.to_manifest()
    if differences(stored, here):
        raise CheckpointError(
            f"model.engram: addresses differ from {folder}: {_explained(stored, here)}. Correct model.engram or the "
            f"tokenizer; or {hint}"
        )


def check_tree(
    folder: Path, stored: Mapping[str, Any] | None, used: Mapping[str, Any] | None, hint: str = ANOTHER_RUN
) -> None:
    """Refuse blocks that were trained with another tree.

    A checkpoint fits every tree if it has no bank or its tree is unknown.

    Args:
        stored, used: contents of tree.json.
        hint: remedy for a user who means another tree.

    Raises:
        CheckpointError: names every field that differs, and why it matters.
    """
    if stored is None or used is None or stored["fingerprint"] == used["fingerprint"]:
        return
    raise CheckpointError(
        f"data.addresses.tree: not the tree that {folder} was trained with: {_explained(stored, used)}. Name the tree "
        f"of the checkpoint ({folder.parent.parent / 'tree'} is a copy of it), or {hint}"
    )


def _explained(stored: Mapping[str, Any], used: Mapping[str, Any]) -> str:
    """Every field that differs, and why it matters."""
    fields = differences(stored, used)
    shown = [f"{name} is {_short(used.get(name))} here and {_short(stored.get(name))} there" for name in fields]
    return ". ".join(["; ".join(shown), *(reason for name, reason in REASONS.items() if name in fields)])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
