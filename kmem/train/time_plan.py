"""`train.minutes`: the number of steps that fit a given time, chosen once from the speed of the first steps."""

import statistics
import time

import torch
import torch.distributed as dist

from kmem.config import Config
from kmem.config.train import MEASURED_STEPS
from kmem.parallel.mesh import local_device

PLANNED = "planned_steps"
"""Name of the chosen number in the facts of checkpoints: a resumed run keeps it."""


class TimePlan:
    """Times the first steps of a run, from now on.

    Args:
        config: has `train.minutes`.
        first: the step that the run begins with.
    """

    def __init__(self, config: Config, first: int) -> None:
        self._config, self._first, self._began = config, first, time.monotonic()
        self._steps: list[float] = []
        self._evaluation = 0.0

    def note_evaluation(self, seconds: float) -> None:
        self._evaluation = seconds

    def steps(self, step: int, seconds: float) -> int | None:
        """The number of steps of the whole run, once it can be chosen; else None. Collective over the world when it is
        chosen, so that all ranks have the same.

        Args:
            step: number of steps done.
            seconds: duration of the last one.
        """
        config, minutes = self._config, self._config.train.minutes
        assert minutes is not None
        self._steps.append(seconds)
        if step - self._first < MEASURED_STEPS:
            return None
        # The first two steps do not count: buffers are made in them.
        each = statistics.mean(self._steps[2:]) + self._evaluation / (config.evaluation.every or config.train.steps)
        left = 60 * minutes - (time.monotonic() - self._began) - self._evaluation
        # At least the steps that have begun to fetch their rows.
        chosen = max(step + config.prefetch_depth + 1, min(config.train.steps, step + int(left / each)))
        agreed = torch.tensor(float(chosen), dtype=torch.float64, device=local_device())
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return int(agreed)
