"""Programs that do the same work, measured in turn.

Each contestant has a process of its own with the same number of threads; while one runs a round, the others wait.
Ratios are taken round by round, so a drift of the machine's speed affects both sides of a ratio.
"""

import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from kmem.config import UserError

Runner = Callable[[int], dict[str, Any]]
"""Runs a number of steps and returns at least `seconds` and `losses`."""


@dataclass
class Contestant:
    """A program to measure: `build(*arguments)` makes its runner inside a process of its own."""

    name: str
    build: Callable[..., Runner]
    arguments: tuple[Any, ...]
    warmup: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    profile: list[tuple[str, float]] = field(default_factory=list)
    """(operator, milliseconds) of one step after the rounds, if requested."""

    def seconds(self) -> list[float]:
        """Wall clock of each round, in seconds."""
        return [measured["seconds"] for measured in self.rounds]

    def median_seconds(self) -> float:
        return statistics.median(self.seconds())


def run_in_turn(
    contestants: Sequence[Contestant],
    *,
    threads: int,
    warmup: int,
    rounds: int,
    steps: int,
    profile: bool = False,
    on_round: Callable[[int], None] = lambda number: None,
) -> None:
    """Warm up each contestant, then run `steps` steps of each in turn, `rounds` times. Contestants keep their results.

    Args:
        threads: threads of each contestant.
        warmup: steps of the warm-up.
        profile: profile a step of the first contestant afterwards.
        on_round: called with the number of each finished round.

    Raises:
        UserError: a contestant failed; contains its traceback.
    """
    with ExitStack() as stack:
        workers = [
            (contestant, stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _set_up, (threads,))))
            for contestant in contestants
        ]
        for contestant, worker in workers:  # contestants are built and warmed up in turn, too
            contestant.warmup = _ask(contestant, worker, warmup)
        for number in range(rounds):
            # The order alternates, so that no contestant always follows the same one.
            for contestant, worker in workers if number % 2 == 0 else reversed(workers):
                contestant.rounds.append(_ask(contestant, worker, steps))
            on_round(number + 1)
        if profile:
            first, worker = workers[0]
            first.profile = _ask(first, worker, 1, True)["operators"]


def ratios(ours: Contestant, theirs: Contestant) -> list[float]:
    """Speed of `ours` as a multiple of `theirs`, by round."""
    return [b / a for a, b in zip(ours.seconds(), theirs.seconds(), strict=True)]


def in_turn(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each step in every round, after one unmeasured round; the order alternates between rounds."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        places = range(len(steps))
        for place in places if number % 2 else reversed(places):
            began = time.perf_counter()
            steps[place]()
            if number:
                seconds[place].append(time.perf_counter() - began)
    return seconds


def _ask(contestant: Contestant, worker: ProcessPoolExecutor, steps: int, profile: bool = False) -> dict[str, Any]:
    try:
        return worker.submit(_run, contestant.build, contestant.arguments, steps, profile).result()
    except BrokenProcessPool:
        raise UserError(f"{contestant.name}: its process died") from None
    except Exception as error:
        raise UserError(f"{contestant.name} failed:\n{''.join(traceback.format_exception(error))}") from None


_runners: list[Runner] = []
"""In the process of a contestant: its runner."""


def _set_up(threads: int) -> None:
    """Set the variables that libraries read when they are loaded. All sides run on the CPU."""
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "KINETO_LOG_LEVEL": "5",
    }
    import torch

    torch.set_num_threads(threads)


def _run(build: Callable[..., Runner], arguments: tuple[Any, ...], steps: int, profile: bool) -> dict[str, Any]:
    """The runner's figures; with `profile`, `operators`: (name, milliseconds of its own CPU time), largest first."""
    import torch

    if not _runners:
        _runners.append(build(*arguments))
    if not profile:
        return _runners[0](steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        _runners[0](steps)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {"operators": [(event.key, event.self_cpu_time_total / 1e3) for event in events]}
