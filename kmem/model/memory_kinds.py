"""The kinds of memory that models can have, in the order in which a layer calls them."""

from .bank_kind import BankKind
from .engram_kind import EngramKind
from .memory_kind import ModelKind
from .over_encoding import OverEncodingKind
from .per_layer_embeddings import PerLayerEmbeddingsKind
from .product_key_memory import ProductKeyMemoryKind
from .shape import Shape

KINDS: dict[str, ModelKind] = {
    kind.name: kind
    for kind in (OverEncodingKind(), EngramKind(), BankKind(), PerLayerEmbeddingsKind(), ProductKeyMemoryKind())
}
"""Name of the section in the model's configuration -> kind."""


def kinds_of(shape: Shape) -> list[ModelKind]:
    """The kinds of memory that a model has."""
    return [kind for name, kind in KINDS.items() if shape.get(name) is not None]


def owner_of(tensor: str) -> str | None:
    """The kind of memory to which a canonical tensor name such as `layers.2.engram.table` belongs; None for the rest
    of the model. Every tensor name of a kind has the kind's name as a component, at the start or after the layer."""
    parts = tensor.split(".")
    name = parts[2] if parts[0] == "layers" else parts[0]
    return name if name in KINDS else None


def layer_kinds(shape: Shape, layer: int) -> list[ModelKind]:
    """The kinds of memory that a layer has."""
    return [kind for kind in kinds_of(shape) if layer in kind.layers(shape)]


def replaces_feed_forward(shape: Shape, layer: int) -> bool:
    """Whether a memory is the layer's feed-forward."""
    return any(kind.replaces_feed_forward(shape, layer) for kind in layer_kinds(shape, layer))


def carries_embedding(shape: Shape) -> bool:
    """Whether the input embedding goes along with the residual stream."""
    return any(kind.carries_embedding(shape) for kind in kinds_of(shape))
