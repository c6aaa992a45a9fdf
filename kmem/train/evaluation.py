"""The held-out evaluation of a run."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from kmem.checkpoint.controls import check_controls, parse_controls
from kmem.config import Config, ConfigError
from kmem.eval.held_out import EvaluationRecord, held_out_loss
from kmem.parallel.memory_kinds import kinds_of
from kmem.train.callback import Callback

if TYPE_CHECKING:
    from kmem.train.trainer import Trainer


class HeldOutEvaluation(Callback):
    """Evaluates before the first step and every `evaluation.every` steps, as trained and with `evaluation.controls`.

    Raises:
        ConfigError: a control that cannot be given while training.
    """

    collective = True

    def __init__(self, config: Config) -> None:
        self._controls = {word: parse_controls([word], "evaluation.controls") for word in config.evaluation.controls}
        shape = config.model.shape
        for word, controls in self._controls.items():
            check_controls(controls, shape, "evaluation.controls")
            for kind in kinds_of(shape):
                if controls.get(kind.name, kind.training_controls[0]) not in kind.training_controls:
                    raise ConfigError(
                        f"evaluation.controls: {word} is for kmem eval; while training: "
                        + ", ".join(kind.training_controls)
                    )

    def on_start(self, trainer: Trainer) -> None:
        if trainer.step == 0 and trainer.config.evaluation.at_start:
            self._evaluate(trainer)

    def before_checkpoint(self, trainer: Trainer) -> None:
        if trainer.evaluation_due(trainer.step):
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        data, sequences = trainer.data, trainer.config.evaluation.sequences
        if not len(data.validation):  # of the chosen subtrees
            return
        began = time.perf_counter()
        loss, tokens = held_out_loss(trainer.pipeline, data, sequences)
        controlled = {}
        for word, controls in self._controls.items():
            other, _ = held_out_loss(trainer.pipeline, data, sequences, controls)
            controlled[word] = {"loss": other, "bits_per_byte": data.bits_per_byte(other)}
        trainer.announce(
            EvaluationRecord(
                step=trainer.step,
                loss=loss,
                bits_per_byte=data.bits_per_byte(loss),
                perplexity=math.exp(min(loss, 700)),
                tokens=tokens,
                seconds=time.perf_counter() - began,
                controls=controlled,
            )
        )
