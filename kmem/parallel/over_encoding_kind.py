"""Over-encoding in training."""

from pathlib import Path

from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.model.over_encoding import OverEncodingKind
from kmem.parallel.token_rows import TokenRowsTraining


class OverEncodingTraining(TokenRowsTraining):
    """Rows of n-grams are fetched ahead of the step that reads them."""

    model = OverEncodingKind()

    def check_added(self, config: Config, folder: Path) -> None:
        raise CheckpointError(
            f"model.over_encoding: {folder} has none, and adding it would scale the input embedding of a trained "
            "model; leave it out, or train from the start"
        )


KIND = OverEncodingTraining()
