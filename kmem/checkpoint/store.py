"""The checkpoints of a run: saved under a temporary name and committed last, listed, verified, loaded, purged."""

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint.api import CheckpointException

from kmem.checkpoint.commit import COMMIT_FILE, Commit, Progress, committed_steps, step_folder, unfinished_folders
from kmem.checkpoint.pieces import CheckpointError, NotFiniteError, Pieces, PiecesLoadPlanner, PiecesSavePlanner
from kmem.checkpoint.storage import SafetensorsStorageReader, SafetensorsStorageWriter
from kmem.config import UserError
from kmem.files import PARTIAL, sync_path

log = logging.getLogger(__name__)


SAVING = timedelta(hours=1)
"""Longest time between the first and the last rank that has written its part of a checkpoint."""


class CheckpointStore:
    """Saves to and loads from `root`. All methods but `wait` and `failure` are collective over the world.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks share.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints at multiples of this step are kept for good.
    """

    def __init__(self, root: Path, keep_last: int = 2, keep_every: int | None = None):
        self.root = root
        self.keep_last = keep_last
        self.keep_every = keep_every
        # A group of its own, so that a background save never mixes with the collectives of training. Ranks that have
        # written their part wait in it for those with hundreds of gigabytes; a rank that is gone ends the wait at once.
        self._group = dist.new_group(backend="gloo", timeout=max(SAVING, distributed_c10d.default_pg_timeout))
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.last_committed: int | None = None
        """Step of the newest checkpoint that this store has saved completely."""

    def save(
        self,
        state: dict[str, Pieces],
        progress: Progress,
        config: dict,
        shapes: dict[str, list[int]],
        asynchronous: bool = False,
        manifests: Mapping[str, dict[str, Any]] | None = None,
        partial: Collection[str] = (),
    ) -> Path:
        """Save the state after `progress.step` steps; returns the folder that the committed checkpoint will have.

        `manifests` are `Commit.manifests`. `partial` names tensors that the ranks hold only in part. With
        `asynchronous` the state is copied to host memory and written in the background, one save at a time.

        Raises:
            CheckpointError: on all ranks alike; earlier checkpoints stay as they are.
        """
        self.wait()
        final = step_folder(self.root, progress.step)
        unfinished = final.with_name(final.name + PARTIAL)

        def prepare() -> None:
            if (final / COMMIT_FILE).is_file():
                _set_aside(final)
            for leftover in (unfinished, final):
                if leftover.is_symlink():
                    leftover.unlink()
                elif leftover.exists():
                    shutil.rmtree(leftover)
            unfinished.mkdir(parents=True)

        self._agree(prepare)

        def write(state: dict[str, Pieces]) -> None:
            def commit(tensors, files) -> None:
                Commit(progress, config, shapes, tensors, files, dict(manifests or {})).write(unfinished)
                os.rename(unfinished, final)
                sync_path(self.root)

            writer = SafetensorsStorageWriter(unfinished, dist.get_rank(), commit)
            try:
                planner = PiecesSavePlanner(lambda key: key.partition("/")[2] in partial)
                dcp.save(state, storage_writer=writer, planner=planner, process_group=self._group)
            except CheckpointException as error:
                if dist.get_rank() == 0:
                    shutil.rmtree(unfinished, ignore_errors=True)
                raise _in_words(f"{final} was not saved", error) from error
            self.last_committed = progress.step
            if dist.get_rank() == 0:
                self._purge(progress.step)

        if not asynchronous:
            write(state)
            return final

        snapshot = {name: pieces.to_host() for name, pieces in state.items()}
        self._writing = self._worker.submit(write, snapshot)
        return final

    def failure(self) -> str | None:
        """Why a background save failed on this rank, or None; `wait` raises the error."""
        error = self._writing.exception() if self._writing is not None and self._writing.done() else None
        return None if error is None else str(error)

    def wait(self) -> None:
        """Wait for a background save.

        Raises:
            CheckpointError: that save failed.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def steps(self) -> list[int]:
        """Steps that have a commit file, ascending; their content is not checked."""
        return self._agree(lambda: committed_steps(self.root))

    def newest(self) -> tuple[Path, Commit] | None:
        """The newest complete and undamaged checkpoint; damaged ones are logged and skipped.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged; starting afresh would hide that.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = step_folder(self.root, step)
            try:
                return folder, self.open(folder)
            except CheckpointError as error:
                if dist.get_rank() == 0:
                    log.warning("checkpoint passed over: %s", error)
        if steps:
            raise CheckpointError(
                f"{self.root}: all checkpoints, of steps {steps}, are damaged; restore one, or remove the folder to "
                "start afresh"
            )
        return None

    def continue_from(self, step: int) -> None:
        """Make the checkpoint of `step` the last of the run. Later checkpoints, which are damaged or belong to an
        abandoned trajectory, are renamed, so that no run resumes from them and `keep_last` does not count them."""

        def set_aside_later() -> list[str]:
            return [_set_aside(step_folder(self.root, later)) for later in committed_steps(self.root) if later > step]

        for name in self._agree(set_aside_later):
            if dist.get_rank() == 0:
                log.warning("%s continues from step %d; a later checkpoint is set aside as %s", self.root, step, name)

    def open(self, folder: Path) -> Commit:
        """Read and verify a checkpoint; each rank verifies a share of its files.

        Raises:
            CheckpointError: on all ranks alike; names the file.
        """
        problem, commit = None, None
        try:
            commit = Commit.read(folder)
            commit.verify(folder, dist.get_rank(), dist.get_world_size())
        except CheckpointError as error:
            problem = str(error)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._group)
        first_problem = next((problem for problem in problems if problem), None)
        if first_problem is not None:
            raise CheckpointError(first_problem)
        assert commit is not None
        return commit

    def load(self, folder: Path, commit: Commit, state: dict[str, Pieces], rounding: bool = False) -> None:
        """Fill `state` in place from a verified checkpoint saved on any mesh.

        Args:
            rounding: live values may have another dtype, to which the stored values are rounded.

        Raises:
            CheckpointError: a tensor is missing or has another size or dtype; names the tensor.
        """
        try:
            dcp.load(
                state,
                storage_reader=SafetensorsStorageReader(folder, commit),
                planner=PiecesLoadPlanner(rounding),
                process_group=self._group,
            )
        except CheckpointException as error:
            raise _in_words(f"{folder} does not fit this model", error) from error

    def _purge(self, saved: int) -> None:
        """Delete checkpoints that need not be kept after the save of a step, and leftovers of interrupted saves."""
        try:
            kept = committed_steps(self.root)
            for step in [step for step in kept if step <= saved][: -self.keep_last]:
                if self.keep_every is None or step % self.keep_every:
                    folder = step_folder(self.root, step)
                    if folder.is_symlink():  # somebody else's checkpoint
                        continue
                    # Under another name, so that neither a reader nor a purge cut short sees half a checkpoint.
                    shutil.rmtree(folder.rename(folder.with_name(folder.name + PARTIAL)))
            for leftover in unfinished_folders(self.root):
                if not leftover.is_symlink():
                    shutil.rmtree(leftover)
        except OSError as error:  # no reason to lose the run
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _agree(self, action: Callable):
        """Run an action on rank 0, and return its result or raise its error on every rank."""
        answer: list = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = action()
            except OSError as error:
                answer[1] = f"{self.root}: {error}"
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]


def _set_aside(folder: Path) -> str:
    """Rename a checkpoint so that it no longer counts as one; returns the new name."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.set-aside-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    sync_path(folder.parent)
    return aside.name


def _in_words(what: str, error: CheckpointException) -> BaseException:
    """The message of the first rank that raised a known error, instead of torch's dump of every rank's traceback."""
    for rank, (cause, _) in sorted(error.failures.items()):
        if isinstance(cause, UserError | OSError):
            kind = NotFiniteError if isinstance(cause, NotFiniteError) else CheckpointError
            return kind(f"{what}: rank {rank}: {cause}")
    return error
