"""The interface of everything a run does besides training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kmem.eval.held_out import EvaluationRecord
    from kmem.train.metrics import StepRecord
    from kmem.train.trainer import Trainer


class Callback:
    """Observes a run. All methods are called on the first rank only and issue no collectives."""

    def on_start(self, trainer: Trainer) -> None:
        """The pipeline is built and loaded; training begins at `trainer.step`."""

    def on_step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def on_evaluation(self, record: EvaluationRecord) -> None:
        """A held-out evaluation is done."""

    def on_checkpoint(self, folder: Path, complete: bool) -> None:
        """A checkpoint was saved or, if not yet `complete`, is being saved in the background."""

    def on_end(self, reason: str) -> None:
        """The run ends without an error: `done`, `interrupted`, or `finished` before it began."""

    def close(self) -> None:
        """Release resources; called in every case, also after an error."""

    def state(self) -> dict[str, object]:
        """Values that checkpoints store for this callback under `tracking`."""
        return {}
