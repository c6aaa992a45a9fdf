"""What the sections of memories have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kmem.config.section import Section

if TYPE_CHECKING:
    from kmem.config.model import ModelConfig
    from kmem.config.run import Config


class MemorySection(Section):
    """A kind of memory in the model's configuration, `model.NAME`."""

    def check_model(self, model: "ModelConfig") -> None:
        """Refuse a model that the memory does not fit.

        Raises:
            ValueError: names the field, below `model`, and the remedy.
        """

    def replaced_layers(self, model: "ModelConfig") -> tuple[int, ...]:
        """Layers whose feed-forward is this memory."""
        return ()

    def check_run(self, config: "Config") -> None:
        """Refuse a run that the memory does not fit.

        Raises:
            ValueError: names the field and the remedy.
        """


def check_layers(field: str, layers: Sequence[int], model: "ModelConfig") -> None:
    """Refuse layers that the model does not have, and a layer that is named twice.

    Raises:
        ValueError: names the field.
    """
    if max(layers) >= model.num_layers:
        raise ValueError(
            f"{field}={list(layers)} is out of range for num_layers={model.num_layers}; layers count from 0"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{field}={list(layers)} names a layer twice")
