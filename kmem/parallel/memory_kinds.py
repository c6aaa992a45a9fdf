"""The training halves of the kinds of memory, joined to their model halves by name."""

from importlib import import_module

from kmem.model.memory_kinds import KINDS as MODEL_KINDS
from kmem.model.memory_kinds import kinds_of as model_kinds_of
from kmem.model.shape import Shape
from kmem.parallel.memory_kind import MemoryKind

KINDS: dict[str, MemoryKind] = {name: import_module(f"kmem.parallel.{name}_kind").KIND for name in MODEL_KINDS}
"""Name -> kind, in the order in which a layer calls them. Each is `KIND` of the module `NAME_kind` in this package."""


def kinds_of(shape: Shape) -> list[MemoryKind]:
    """The kinds of memory that a model has."""
    return [KINDS[kind.name] for kind in model_kinds_of(shape)]


def register(kind: MemoryKind) -> None:
    """Add a kind of one's own, with both halves, in every process before it builds a model.

    Its sections, `model.NAME` and the top-level `NAME`, are fields of subclasses of `ModelConfig` and `Config`.

    Raises:
        ValueError: there is another kind of this name.
    """
    if KINDS.get(kind.name, kind) is not kind:
        raise ValueError(f"there is a kind of memory named {kind.name}; choose another name")
    MODEL_KINDS[kind.name], KINDS[kind.name] = kind.model, kind
