"""The kinds of memory that models can have, in the order in which a layer calls them."""

from .bank_kind import BankKind
from .engram_kind import EngramKind
from .memory_kind import ModelKind
from .shape import Shape

KINDS: dict[str, ModelKind] = {kind.name: kind for kind in (EngramKind(), BankKind())}
"""By the name of the section in the model's configuration."""


def kinds_of(shape: Shape) -> list[ModelKind]:
    """The kinds of memory that a model has."""
    return [kind for name, kind in KINDS.items() if shape.get(name) is not None]


def owner_of(tensor: str) -> str | None:
    """The kind of memory that a canonical tensor name belongs to, as in `layers.2.engram.table`; None for the rest of
    the model. All names of a kind have its name as a component, at the start or behind the layer."""
    parts = tensor.split(".")
    name = parts[2] if parts[0] == "layers" else parts[0]
    return name if name in KINDS else None


def layer_kinds(shape: Shape, layer: int) -> list[ModelKind]:
    """The kinds of memory that a layer has."""
    return [kind for kind in kinds_of(shape) if layer in kind.layers(shape)]
