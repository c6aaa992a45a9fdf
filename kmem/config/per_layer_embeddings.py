"""Per-layer embeddings: a vector per token id in each layer."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from kmem.config.memory import MemorySection, check_layers
from kmem.config.section import Width

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig


class PerLayerEmbeddingsConfig(MemorySection):
    """A vector per token id in each of the chosen layers, as in Gemma 3n or in STEM. `docs/per_layer_embeddings.md` has
    the formulas."""

    form: Literal["gemma3n", "stem"] = "gemma3n"
    """gemma3n: the vector, mixed with a projection of the input embedding, gates an update at the end of the layer.
    stem: it takes the place of the up-projection in the layer's feed-forward, experts included."""
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """Decoder layers that have it, counted from 0. Default: all (STEM's best was half of them)."""
    width: Width = 256
    """gemma3n: values of a vector. A stem vector has intermediate_size values."""
    output_scale: NonNegativeFloat = 1.0
    """gemma3n: initial weight of the norm of the update. 0 starts as an exact no-op, so that a trained model can be
    given the memory."""
    init_std: NonNegativeFloat | None = None
    """Standard deviation of the initial vectors. Default: `model.init_std`."""

    def check_model(self, model: "ModelConfig") -> None:
        if self.layers is not None:
            check_layers("per_layer_embeddings.layers", self.layers, model)
        if self.form == "stem" and model.intermediate_size is None:
            raise ValueError("per_layer_embeddings.form=stem needs intermediate_size, the width of its vectors")

    def replaced_layers(self, model: "ModelConfig") -> tuple[int, ...]:
        if self.form != "stem":
            return ()
        return tuple(range(model.num_layers)) if self.layers is None else self.layers
