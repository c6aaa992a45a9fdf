"""Per-layer embeddings in training."""

from pathlib import Path
from typing import Any

from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.model.per_layer_embeddings import PerLayerEmbeddingsKind
from kmem.parallel.token_rows import TokenRowsTraining


class PerLayerEmbeddingsTraining(TokenRowsTraining):
    """Rows of token ids are fetched ahead of the step that reads them."""

    model = PerLayerEmbeddingsKind()
    draws_added_rows = True  # the update is scaled by zero at first, whatever the rows hold

    def check_added(self, config: Config, folder: Path) -> None:
        section = config.model.per_layer_embeddings
        assert section is not None
        if section.form == "stem" or section.output_scale:
            raise CheckpointError(
                f"model.per_layer_embeddings: {folder} has none, and adding it would change what the model computes; "
                "choose form=gemma3n with output_scale=0, leave it out, or train from the start"
            )

    def compared(self, section: dict[str, Any]) -> dict[str, Any]:
        return section | {"output_scale": None}  # an initial value


KIND = PerLayerEmbeddingsTraining()
