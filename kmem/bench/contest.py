"""Programs that do the same work, measured in turn.

Each contestant has a process of its own with the same number of threads; while one runs a round, the others wait.
Ratios are taken round by round, so a drift of the machine's speed affects both sides of a ratio.
"""

import multiprocessing as mp
import os
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kmem.config import UserError

Runner = Callable[[int], dict[str, Any]]
"""Runs a number of steps and returns at least `seconds` and `losses`. For 0 steps it profiles one step and returns
`operators`."""


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
    context = mp.get_context("spawn")
    lines = []
    # Contestants inherit these variables, which libraries read when they are loaded. All sides run on the CPU.
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "KINETO_LOG_LEVEL": "5",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        for contestant in contestants:
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(contestant.build, contestant.arguments, threads, there), daemon=True
            )
            process.start()
            there.close()
            lines.append((contestant, process, here))
        for contestant, _, line in lines:  # contestants are built and warmed up in turn, too
            contestant.warmup = _ask(contestant, line, warmup)
        for number in range(rounds):
            # The order alternates, so that no contestant always follows the same one.
            for contestant, _, line in lines if number % 2 == 0 else reversed(lines):
                contestant.rounds.append(_ask(contestant, line, steps))
            on_round(number + 1)
        if profile:
            first, _, line = lines[0]
            first.profile = _ask(first, line, 0)["operators"]
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        for _, process, line in lines:
            line.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def ratios(ours: Contestant, theirs: Contestant) -> list[float]:
    """Speed of `ours` as a multiple of `theirs`, by round."""
    return [b / a for a, b in zip(ours.seconds(), theirs.seconds(), strict=True)]


def _ask(contestant: Contestant, line: Any, steps: int) -> dict[str, Any]:
    line.send(steps)
    try:
        answer = line.recv()
    except EOFError:
        raise UserError(f"{contestant.name}: its process died") from None
    if isinstance(answer, str):
        raise UserError(f"{contestant.name} failed:\n{answer}")
    return answer


def _serve(build: Callable[..., Runner], arguments: tuple[Any, ...], threads: int, line: Any) -> None:
    import torch

    torch.set_num_threads(threads)
    runner = None
    try:
        while True:
            steps = line.recv()
            if runner is None:
                runner = build(*arguments)
            line.send(runner(steps))
    except EOFError:
        pass
    except BaseException:
        line.send(traceback.format_exc())
