"""The visible output of a run: a progress bar on a terminal, plain lines otherwise, and metrics.jsonl."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kmem.eval.held_out import EvaluationRecord
from kmem.files import atomic_write
from kmem.train.callback import Callback
from kmem.train.metrics import StepRecord
from kmem.wording import counted

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from kmem.train.trainer import Trainer


class MetricsFile(Callback):
    """Appends every step and evaluation to metrics.jsonl."""

    def on_start(self, trainer: Trainer) -> None:
        """Drop the steps that a run resumed after `trainer.step` will repeat; a fresh start repeats all steps."""
        self.path = trainer.folder.metrics
        if self.path.exists():
            lines, step = self.path.read_bytes().splitlines(True), trainer.step
            damaged = sum(_step_of(line) == float("inf") for line in lines[:-1])  # a kill may have cut the last one
            if damaged:
                log.warning("%s: %s not readable, and left out", self.path, counted(damaged, "line"))
            atomic_write(self.path, b"".join(line for line in lines if step and _step_of(line) <= step))

    def on_step(self, record: StepRecord | EvaluationRecord) -> None:
        line = json.dumps(record.to_json()).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(end)  # no half line
                raise

    on_evaluation = on_step


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for a damaged one, such as the last line of a run that was killed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


class ProgressReport(Callback):
    """A rich progress bar on a terminal; a line every `log_every` steps otherwise."""

    def __init__(self, log_every: int):
        self.log_every = log_every
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._speed = 0.0

    def on_preparing(self, what: str) -> None:
        self._say(f"{what} ..")

    def on_start(self, trainer: Trainer) -> None:
        self._total, self._first, self._began = trainer.config.train.steps, trainer.step, 0.0
        self._bank_alone = trainer.config.model.frozen_anchor
        self._say(trainer.summary())
        self._bar.start()
        self._task = self._bar.add_task("train", total=self._total, completed=trainer.step, loss="-", speed="-")

    def on_step(self, record: StepRecord) -> None:
        if not self._began:  # the clock of the estimate starts after the first step, which is slow
            self._first, self._began = record.step, time.monotonic()
        # Speeds of single steps jump; the average follows a change within some ten steps.
        self._speed = (
            record.tokens_per_second if not self._speed else 0.9 * self._speed + 0.1 * record.tokens_per_second
        )
        if not self._bar.disable:
            self._bar.update(self._task, completed=record.step, loss=f"{record.loss:.4f}", speed=f"{self._speed:,.0f}")
        elif record.step % self.log_every == 0 or record.step == self._total:
            done = record.step - self._first
            each = (time.monotonic() - self._began) / done if done else record.seconds
            left = each * (self._total - record.step)
            self._say(
                f"step {record.step}/{self._total}  loss {record.loss:.4f}  {self._training(record)}  "
                f"lr {record.lr:.2e}  {self._speed:,.0f} tokens/s  left {int(left) // 60}:{int(left) % 60:02d}"
            )

    def on_steps_chosen(self, steps: int, seconds: float) -> None:
        self._total = steps
        if not self._bar.disable:
            self._bar.update(self._task, total=steps)
        self._say(f"train.minutes: {counted(steps, 'step')} of about {seconds:.2f} s fit; the schedule ends there")

    def _training(self, record: StepRecord) -> str:
        """The gradient norm of the weights. A frozen anchor has none, so it is the number of blocks that the step
        trained: the norm of the blocks' gradients is not known here, since only clipping sums it over ranks."""
        if self._bank_alone:
            return f"blocks {sum(level['touched_blocks'] for level in record.memories['bank'].values()):,}"
        return f"grad {record.grad_norm:.2f}"

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self._say(
            f"held out at step {record.step}: {record.bits_per_byte:.4f} bits per byte "
            f"(loss {record.loss:.4f}, perplexity {record.perplexity:.1f}, {counted(record.tokens, 'token')})"
        )
        for control, figures in record.controls.items():
            worse = figures["bits_per_byte"] - record.bits_per_byte
            self._say(f"  {control}: {figures['bits_per_byte']:.4f} bits per byte ({worse:+.4f})")

    def on_checkpoint(self, folder: Path, complete: bool) -> None:
        if self._bar.disable:
            self._say(f"saved {folder}" if complete else f"saving {folder} in the background")

    def on_end(self, reason: str) -> None:
        self.close()
        if reason == "finished":
            self._say(f"nothing to do: the run has its {counted(self._total, 'step')}; raise train.steps to continue")
        if reason == "interrupted":
            self._say("interrupted: the state is saved; run the same command again to continue")

    def close(self) -> None:
        self._bar.stop()

    def _say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)
