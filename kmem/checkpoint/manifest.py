"""A table is meaningless without its addressing: a checkpoint's is compared with the one in use at every load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kmem.checkpoint.pieces import CheckpointError
from kmem.model.engram_ngrams import differences
from kmem.model.engram_reader import EngramAddresses

REASONS = {
    "tokenizer_fingerprint": "The tokenizer is another one: use the one that the run was trained with",
    "compression_digest": "The vocabulary is compressed otherwise: use the tokenizer and the version of the tokenizers "
    "library, that the run was trained with",
    "sizes": "Rows per head decide the prime of every hash, so no row of a table of another size keeps its address: "
    "a table cannot grow",
}
ANOTHER_RUN = "start a run of another name"
"""What can always be done about a checkpoint that a run found in its own folder."""


def check_addressing(folder: Path, stored: Mapping[str, Any], used: EngramAddresses, hint: str = ANOTHER_RUN) -> None:
    """Refuse rows that would be read by other addresses than they were trained with.

    Args:
        hint: what to do where another model is meant.

    Raises:
        CheckpointError: names every field that differs, and why it matters.
    """
    here = used.addressing.to_manifest()
    fields = differences(stored, here)
    if fields:
        shown = [f"{name} is {_short(here.get(name))} here and {_short(stored.get(name))} there" for name in fields]
        reasons = [reason for name, reason in REASONS.items() if name in fields] or ["Correct model.engram"]
        raise CheckpointError(
            f"model.engram: addresses differ from those of {folder}: {'; '.join(shown)}. {'. '.join(reasons)}; or "
            + hint
        )


_SHOWN = 60
"""Characters of two values that are shown beside each other; lists and digests say nothing to anyone."""
TREE_REASONS = {
    "tokenizer": "Its embedder counts token ids of another tokenizer",
    "files": "Its centroids are others, so a leaf holds other documents",
    "embedder": "Documents are embedded otherwise, so a leaf holds other documents",
    "unit": "What has an address of its own is another part of the text",
}


def check_tree(
    folder: Path, stored: Mapping[str, Any] | None, used: Mapping[str, Any] | None, hint: str = ANOTHER_RUN
) -> None:
    """Refuse blocks that would be fetched by the leaves of another tree than they were trained with.

    A checkpoint without a bank, or one of which no tree is known, goes with every tree.

    Args:
        stored, used: contents of tree.json.
        hint: what to do where another tree is meant.

    Raises:
        CheckpointError: names every field that differs, and why it matters.
    """
    if stored is None or used is None or stored["fingerprint"] == used["fingerprint"]:
        return
    named = [name for name in sorted(stored.keys() | used.keys()) if stored.get(name) != used.get(name)]
    named.remove("fingerprint")
    values = {name: [str(tree.get(name)) for tree in (used, stored)] for name in named}
    shown = [
        f"{name} is {here} here and {there} there" if len(here) + len(there) <= _SHOWN else f"{name} differs"
        for name, (here, there) in values.items()
    ]
    reasons = [reason for name, reason in TREE_REASONS.items() if name in named]
    raise CheckpointError(
        f"data.addresses.tree: not the tree that {folder} was trained with ({used['fingerprint'][:12]} here, "
        f"{stored['fingerprint'][:12]} there): {'; '.join(shown)}. "
        + "".join(f"{reason}. " for reason in reasons)
        + f"Name that tree, of which {folder.parent.parent / 'tree'} is a copy, or {hint}"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
