"""A callback of one's own: it keeps the steps with the worst losses, and writes them where the run is.

    python examples/custom_callback.py

Callbacks run on the first rank and issue no collectives. What `state` gives is kept in checkpoints, and
`trainer.tracking` gives it back to a run that goes on.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

from small_corpus import small_corpus, small_run

from kmem.config import parse_config
from kmem.data.reader import open_data
from kmem.files import atomic_write
from kmem.parallel.joining import join_mesh, leave_mesh
from kmem.train.callback import Callback
from kmem.train.metrics import StepRecord
from kmem.train.reporting import MetricsFile, ProgressReport
from kmem.train.run_folder import RunFolder
from kmem.train.trainer import Trainer


class WorstSteps(Callback):
    """Writes worst_steps.json: the steps with the largest losses after the first ones, and the samples they read.

    Args:
        keep: how many steps.
        skip: steps at the start, whose losses say nothing about the data.
    """

    def __init__(self, folder: RunFolder, keep: int = 3, skip: int = 2) -> None:
        self.path = folder.path / "worst_steps.json"
        self.keep, self.skip = keep, skip
        self.worst: list[dict[str, float]] = []

    def on_start(self, trainer: Trainer) -> None:
        self.samples = trainer.config.train.global_batch_size
        self.worst = list(trainer.tracking.get("worst_steps", []))

    def on_step(self, record: StepRecord) -> None:
        if record.step > self.skip:
            first = record.consumed_samples - self.samples
            self.worst.append({"step": record.step, "loss": record.loss, "first_sample": first})
            self.worst = sorted(self.worst, key=lambda entry: -entry["loss"])[: self.keep]

    def on_end(self, reason: str) -> None:
        atomic_write(self.path, json.dumps(self.worst, indent=2) + "\n")

    def state(self) -> dict[str, object]:
        return {"worst_steps": self.worst}


def main() -> None:
    place = Path(tempfile.mkdtemp())
    config = parse_config(small_run(place, small_corpus(place), steps=8))
    mesh = join_mesh(config)
    data = open_data(config.data, config.model.vocab_size)
    worst = WorstSteps(RunFolder(config))
    Trainer(config, mesh, data, [MetricsFile(), ProgressReport(1), worst]).fit()
    print(f"{worst.path}:\n{worst.path.read_text()}", end="")
    leave_mesh()


if __name__ == "__main__":
    main()
