"""A folder beside the result in which long work proceeds, so that an interruption costs the last few seconds."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from kmem.config import UserError
from kmem.data.progress import Progress
from kmem.data.workers import Workers

Job = TypeVar("Job")
Result = TypeVar("Result")

_PLAN, _DONE = "plan.json", "done.json"
_SECONDS_BETWEEN_MARKS = 2.0
SECONDS_WORTH_PROCESSES = 20.0
"""Work that is left before processes are started, each of which imports PyTorch and more."""


class Pool:
    """Worker processes that are started when a stage turns out to be long, and serve all later ones."""

    def __init__(self, count: int):
        self._count = count
        self._workers = Workers(count)

    def __enter__(self) -> "Pool":
        self._workers.__enter__()  # starts no process yet
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.__exit__(kind, error, trace)

    def in_order(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], weights: Sequence[int]
    ) -> Iterator[Result]:
        """function of each job, in the order of the jobs.

        Args:
            weights: how much work each job is.
        """
        started, left = time.monotonic(), sum(weights)
        total = left
        for number, job in enumerate(jobs):
            spent = time.monotonic() - started
            if self._count > 1 and number and spent / (total - left) * left > SECONDS_WORTH_PROCESSES:
                yield from self._workers.in_order(function, jobs[number:])
                return
            yield function(job)
            left -= weights[number]


class Workspace:
    """Arrays in files, and how many jobs of each stage are in them.

    A stage is a list of jobs that depends on the plan alone. Results are stored in the order of the jobs, so one number
    says what is done, and neither an interruption nor the number of workers changes anything.
    """

    def __init__(self, folder: Path, pool: Pool, plan: dict[str, Any], force: bool, later: Sequence[str] = ()):
        """
        Args:
            plan: everything that decides the result.
            force: begin anew where the folder holds work on another plan.
            later: entries of the plan that the stage `embed` does not depend on. Where the work differs in these
                alone, that stage is kept and the others begin anew.

        Raises:
            UserError: it holds work on another plan, or cannot be written.
        """
        self.folder, self._pool = folder, pool
        found = self._found()
        differs = [] if found is None else [name for name in plan if found.get(name) != plan[name]]
        embedded = found is not None and set(differs) <= set(later)
        if found is not None and not embedded and not force:
            raise UserError(
                f"{folder}: holds interrupted work with another {', '.join(differs)}; continue with what it began "
                "with, or begin anew with --force"
            )
        self._done: dict[str, int] = {}
        if not embedded:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                (folder / _PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        elif (folder / _DONE).is_file():
            self._done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        if embedded and differs:
            self._done = {stage: done for stage, done in self._done.items() if stage == "embed"}
            self._replace(_DONE, self._done)
            shutil.rmtree(folder / "tree", ignore_errors=True)
            self._replace(_PLAN, plan)

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap[Any, Any]:
        """A memory-mapped array, zero until it is written."""
        path = self.folder / f"{name}.array"
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            try:
                with open(path, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is noticed now, not as a bus error
            except OSError as error:
                raise UserError(f"{path}: {size / 1e9:.1f} GB cannot be written ({error.strerror})") from None
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

    def run(
        self,
        stage: str,
        title: str,
        jobs: Sequence[Job],
        function: Callable[[Job], Result],
        store: Callable[[Job, Result], None],
        into: np.memmap[Any, Any],
        weights: Sequence[int] | None = None,
    ) -> None:
        """Do what is left of a stage.

        Args:
            function: a module's function, computed here or in worker processes.
            store: puts a result into the array `into`.
            weights: how much work each job is; equally much by default.
        """
        done = self._done.get(stage, 0)
        if done >= len(jobs):
            return
        weights = [1] * len(jobs) if weights is None else weights
        with Progress(title, sum(weights)) as progress:
            progress.advance(sum(weights[:done]))
            marked = time.monotonic()
            try:
                for result in self._pool.in_order(function, jobs[done:], weights[done:]):
                    store(jobs[done], result)
                    progress.advance(weights[done])
                    done += 1
                    if time.monotonic() - marked > _SECONDS_BETWEEN_MARKS:
                        self._mark(stage, done, into)
                        marked = time.monotonic()
            finally:
                self._mark(stage, done, into)

    def remove(self) -> None:
        """The work is finished and its result stored elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _mark(self, stage: str, done: int, array: np.memmap[Any, Any]) -> None:
        array.flush()
        self._done[stage] = done
        self._replace(_DONE, self._done)

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        building = self.folder / (name + ".building")
        building.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(building, self.folder / name)

    def _found(self) -> dict[str, Any] | None:
        """The plan of the work in the folder."""
        if not self.folder.exists():
            return None
        try:
            plan = json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            plan = None
        if not isinstance(plan, dict):
            if not self.folder.is_dir() or any(entry.name != _PLAN for entry in self.folder.iterdir()):
                raise UserError(f"{self.folder}: not the work of kmem data cluster; move it away")
            return None
        return plan
