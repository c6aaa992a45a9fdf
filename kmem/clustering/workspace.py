"""A folder beside the result for long work, so that an interruption loses only the last few seconds."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.progress import Progress
from kmem.data.workers import Workers
from kmem.files import atomic_write

Job = TypeVar("Job")
Result = TypeVar("Result")

_PLAN, _DONE = "plan.json", "done.json"
_FINISHED = ".finished"
"""Suffix of the name of a folder whose work is finished, while its files are deleted."""
_SECONDS_BETWEEN_MARKS = 2.0
SECONDS_WORTH_PROCESSES = 20.0
"""Processes are started only if more work than this is left, since each imports PyTorch and more."""


class Pool(Workers):
    """Worker processes, started once a stage turns out to be long and used for all later stages."""

    def __init__(self, count: int):
        super().__init__(count)
        self._locks: list[int] = []

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        super().__exit__(kind, *details)
        while self._locks:
            os.close(self._locks.pop())

    def lock(self, folder: Path) -> None:
        """Lock a folder, if it exists, against other processes until the pool is left.

        Raises:
            UserError: another process is at work in it.
        """
        if not folder.is_dir():
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{folder}: another kmem data cluster is at work here; wait until it ends") from None
        self._locks.append(descriptor)

    def weighed(
        self, function: Callable[[Job], Result], jobs: Sequence[Job], weights: Sequence[int]
    ) -> Iterator[Result]:
        """Apply `function` to each job and yield results in the order of the jobs.

        Args:
            weights: the amount of work of each job.
        """
        started, left = time.monotonic(), sum(weights)
        total = left
        for number, job in enumerate(jobs):
            spent = time.monotonic() - started
            if self._count > 1 and number and spent / (total - left) * left > SECONDS_WORTH_PROCESSES:
                yield from self.in_order(function, jobs[number:])
                return
            yield function(job)
            left -= weights[number]


class Workspace:
    """Results in files, and the number of jobs of each stage whose results they hold.

    A stage is a list of jobs that depends on the plan alone. Results are stored in the order of the jobs, so one number
    per stage says what is done, and neither an interruption nor the number of workers changes the result.

    That number never claims more than the files hold: it is written after them and withdrawn before one is made anew,
    and the folder is renamed before anything in it is deleted.
    """

    def __init__(
        self,
        folder: Path,
        pool: Pool,
        plan: dict[str, Any],
        force: bool,
        later: Sequence[str] = (),
        kept: Sequence[str] = (),
    ):
        """
        Args:
            plan: everything that decides the result.
            force: begin anew if the folder holds work on another plan.
            later: entries of the plan that the stages in `kept` do not depend on. If the plans differ only in these,
                those stages are kept and the others begin anew.

        Raises:
            UserError: the folder holds work on another plan, or cannot be written.
        """
        self.folder, self._pool = folder, pool
        clear_finished(folder)
        pool.lock(folder)
        stored = self._found()
        differs = [] if stored is None else [name for name in plan if stored.get(name) != plan[name]]
        continues = stored is not None and set(differs) <= set(later)
        if stored is not None and not continues and not force:
            raise UserError(
                f"{folder}: holds interrupted work with another {', '.join(differs)}; continue with the same options, "
                "or begin anew with --force"
            )
        self._done = self._recorded() if continues else {}
        if not continues:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                pool.lock(folder)
                self._replace(_PLAN, plan)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
        elif differs:
            self._done = {stage: done for stage, done in self._done.items() if stage in kept}
            self._replace(_DONE, self._done)
            shutil.rmtree(folder / "tree", ignore_errors=True)
            self._replace(_PLAN, plan)

    def array(self, stage: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.memmap[Any, Any]:
        """The memory-mapped array `STAGE.array` with the results of a stage, zero until they are written.

        If the file is missing or has another size, the stage starts from its first job.
        """
        path = self.folder / f"{stage}.array"
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            # Recorded before the file is made anew, so that zeros are never taken for results.
            if self._done.pop(stage, 0):
                self._replace(_DONE, self._done)
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
        function: Callable[[Job], NDArray[Any]],
        into: np.memmap[Any, Any],
        rows: Sequence[int],
        weights: Sequence[int] | None = None,
    ) -> None:
        """Run the remaining jobs of a stage.

        Args:
            function: a module-level function, or a part of one, called here or in worker processes.
            into: the stage's array. The results are its rows, in the order of the jobs.
            rows: number of rows of each job's result.
            weights: the amount of work of each job; equal by default.
        """
        ends = np.cumsum(rows)

        def store(number: int, result: NDArray[Any]) -> None:
            into[ends[number] - rows[number] : ends[number]] = result

        def save(done: int) -> int:
            into.flush()
            return done

        self._proceed(stage, title, jobs, function, store, save, weights)

    def add_up(
        self,
        stage: str,
        title: str,
        jobs: Sequence[Job],
        function: Callable[[Job], NDArray[np.int64]],
        total: NDArray[np.int64],
        weights: Sequence[int] | None = None,
    ) -> None:
        """Run the remaining jobs of a stage whose result is the sum of the jobs' results; add it to `total`.

        Each mark replaces the file `STAGE.sum`, which holds the number of jobs and their sum, so that no job is counted
        twice.
        """
        path = self.folder / f"{stage}.sum"
        # The number of jobs and their sum change together; an interruption in between would count a job twice.
        state = [np.zeros(1 + len(total), dtype=np.int64)]
        if stage in self._done and path.is_file() and path.stat().st_size == state[0].nbytes:
            state = [np.fromfile(path, dtype=np.int64)]
        self._done[stage] = int(state[0][0])

        def store(_: int, result: NDArray[np.int64]) -> None:
            state[0] = state[0] + np.append(1, result)

        def save(_: int) -> int:
            atomic_write(path, state[0].tobytes())
            return int(state[0][0])

        self._proceed(stage, title, jobs, function, store, save, weights)
        total += state[0][1:]

    def remove(self) -> None:
        """Delete the folder: the work is finished and its result stored elsewhere, or the work cannot be done."""
        try:
            os.rename(self.folder, _finished(self.folder))
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be removed ({error.strerror}); delete it") from None
        clear_finished(self.folder)

    def _proceed(
        self,
        stage: str,
        title: str,
        jobs: Sequence[Job],
        function: Callable[[Job], Result],
        store: Callable[[int, Result], None],
        save: Callable[[int], int],
        weights: Sequence[int] | None,
    ) -> None:
        """
        Args:
            store: gets the number of a job and its result.
            save: gets the number of finished jobs, writes results to disk, and returns the number of jobs they cover.
        """
        done = self._done.get(stage, 0)
        if done >= len(jobs):
            return
        weights = [1] * len(jobs) if weights is None else weights
        with Progress(title, sum(weights)) as progress:
            progress.advance(sum(weights[:done]))
            marked = time.monotonic()
            try:
                for result in self._pool.weighed(function, jobs[done:], weights[done:]):
                    store(done, result)
                    progress.advance(weights[done])
                    done += 1
                    if time.monotonic() - marked > _SECONDS_BETWEEN_MARKS:
                        self._mark(stage, save(done))
                        marked = time.monotonic()
            finally:
                self._mark(stage, save(done))

    def _mark(self, stage: str, done: int) -> None:
        self._done[stage] = done
        self._replace(_DONE, self._done)

    def _replace(self, name: str, content: dict[str, Any]) -> None:
        atomic_write(self.folder / name, json.dumps(content, indent=2) + "\n")

    def _recorded(self) -> dict[str, int]:
        """Stage -> finished jobs; empty if the record cannot be read, as after a power cut."""
        try:
            record = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            return {str(stage): int(done) for stage, done in record.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _found(self) -> dict[str, Any] | None:
        """The plan of the work in the folder; None if there is no work."""
        if not self.folder.exists():
            return None
        try:
            plan = json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            plan = None
        if not isinstance(plan, dict):
            if not self.folder.is_dir() or any(not entry.name.startswith(_PLAN) for entry in self.folder.iterdir()):
                raise UserError(f"{self.folder}: not the work of kmem data cluster; move it away")
            return None
        return plan


def clear_finished(folder: Path) -> None:
    """Delete what is left of the work in `folder` if a process was killed while it removed finished work."""
    shutil.rmtree(_finished(folder), ignore_errors=True)


def _finished(folder: Path) -> Path:
    return folder.with_name(folder.name + _FINISHED)
