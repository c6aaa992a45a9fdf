"""Keys that once had another name: files that kmem has saved are read under the names of today, and a user's
configuration is told the new one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kmem.model.renamed import MODEL_KEYS


def _same(value: Any) -> Any:
    return value


def _controls(value: Any) -> Any:
    return [f"bank={choice}" for choice in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class NewName:
    """What a key has become."""

    key: str
    """In the same section."""
    value: Callable[[Any], Any] = _same
    """From what stood under the old key to what stands under the new one."""


RENAMED: Mapping[str, NewName] = {
    "memory": NewName("engram"),
    "evaluation.bank_controls": NewName("controls", _controls),
    **{f"model.{old}": NewName(new) for old, new in MODEL_KEYS.items()},
}
"""Path of the old key -> what it has become."""


COMMIT_KEYS: Mapping[str, tuple[str, ...]] = {
    "addressing": ("manifests", "engram"),
    "tree": ("manifests", "bank"),
    "progress.bank_seed": ("progress", "memories", "bank", "seed"),
    "progress.bank_start": ("progress", "memories", "bank", "start"),
}
"""Path of an old key in a checkpoint's commit file -> where its value is today."""


def saved_commit(body: dict[str, Any]) -> dict[str, Any]:
    """The content of a commit file, as plain data, under the names of today."""
    found = {**body, "config": saved_config(body["config"]), "progress": dict(body["progress"])}
    for old, path in COMMIT_KEYS.items():
        *parents, key = old.split(".")
        section = found["progress"] if parents else found
        value = section.pop(key, None)
        if value is not None:
            target = found
            for name in path[:-1]:
                target = target.setdefault(name, {})
            target[path[-1]] = value
    return {"manifests": {}, **found}


def saved_config(tree: Any, section: str = "") -> Any:
    """A configuration that kmem has saved, as plain data, under the names of today.

    Args:
        section: path of `tree` in the configuration, with a dot at its end.
    """
    if not isinstance(tree, dict):
        return tree
    found = {}
    for key, value in tree.items():
        new = RENAMED.get(f"{section}{key}")
        if new is None or new.key in tree:  # where someone has added the new one, the old one is an error
            new = NewName(key)
        found[new.key] = new.value(saved_config(value, f"{section}{new.key}."))
    return found
