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
