"""Renamed keys. In files that kmem has saved, old names are replaced by the current ones; in a user's configuration, an
old name is an error that gives the new one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kmem.model.renamed import MODEL_KEYS


def _controls(value: Any) -> Any:
    return [f"bank={choice}" for choice in value] if isinstance(value, list | tuple) else value


def _recompute(value: Any) -> Any:
    return ("none", "full")[value] if isinstance(value, bool) else value


@dataclass(frozen=True)
class NewName:
    """The new name of a key."""

    key: str
    """The new key, in the same section."""
    value: Callable[[Any], Any] = lambda value: value
    """Converts the value of the old key to the value of the new one."""


RENAMED: Mapping[str, NewName] = {
    "memory": NewName("engram"),
    "train.activation_checkpointing": NewName("recompute", _recompute),
    "evaluation.bank_controls": NewName("controls", _controls),
    **{f"model.{old}": NewName(new) for old, new in MODEL_KEYS.items()},
}
"""Path of the old key -> its new name."""


COMMIT_KEYS: Mapping[str, tuple[str, ...]] = {
    "addressing": ("manifests", "engram"),
    "tree": ("manifests", "bank"),
    "progress.bank_seed": ("progress", "memories", "bank", "seed"),
    "progress.bank_start": ("progress", "memories", "bank", "start"),
}
"""Path of an old key in a checkpoint's commit file -> current path of its value."""


def saved_commit(body: dict[str, Any]) -> dict[str, Any]:
    """The content of a commit file, as plain data, under the current names."""
    current = {**body, "config": saved_config(body["config"]), "progress": dict(body["progress"])}
    for old, path in COMMIT_KEYS.items():
        *parents, key = old.split(".")
        section = current["progress"] if parents else current
        value = section.pop(key, None)
        if value is not None:
            target = current
            for name in path[:-1]:
                target = target.setdefault(name, {})
            target[path[-1]] = value
    return {"manifests": {}, **current}


def saved_config(tree: Any, section: str = "") -> Any:
    """A configuration that kmem has saved, as plain data, under the current names.

    Args:
        section: path of `tree` in the configuration, with a dot at its end.
    """
    if not isinstance(tree, dict):
        return tree
    current = {}
    for key, value in tree.items():
        new = RENAMED.get(f"{section}{key}")
        if new is None or new.key in tree:  # next to the new key, the old one stays, as an error
            new = NewName(key)
        current[new.key] = new.value(saved_config(value, f"{section}{new.key}."))
    return current
