"""What the sections of memories have in common."""

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
