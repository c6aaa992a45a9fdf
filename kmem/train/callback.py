"""The interface of everything a run does besides training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path

    from kmem.eval.held_out import EvaluationRecord
    from kmem.train.metrics import StepRecord
    from kmem.train.trainer import Trainer


class Callback:
    """Observes a run, and may do something besides training.

    Callbacks are called in their order. One that is not collective is called on the first rank only.
    """

    collective: ClassVar[bool] = False
    """Whether it is called on every rank, and so may issue collectives; all ranks must then issue the same."""

    def on_preparing(self, what: str) -> None:
        """Something that may take long begins, before training does, such as `building the model`."""

    def on_start(self, trainer: Trainer) -> None:
        """The pipeline is built and loaded; training begins at `trainer.step`."""

    def on_step(self, record: StepRecord) -> None:
        """An optimizer step is done."""

    def on_steps_chosen(self, steps: int, seconds: float) -> None:
        """The run has `train.minutes`, and its number of steps was chosen. `seconds`: duration of the last step."""

    def before_checkpoint(self, trainer: Trainer) -> None:
        """An optimizer step is done and recorded, and the run was not interrupted. What it adds to `trainer.facts` is
        part of the checkpoint, if one follows."""

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
