"""Where a run begins: with its own checkpoint, with that of another run, or with the weights of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kmem.checkpoint.commit import Commit
from kmem.checkpoint.manifest import ANOTHER_RUN
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import find_checkpoint
from kmem.checkpoint.store import CheckpointStore
from kmem.config import CheckpointConfig, Config, UserError
from kmem.data.reader import PreparedData
from kmem.parallel.mesh import run_on_all_ranks
from kmem.train.load_plan import check_manifests


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run begins with."""

    folder: Path
    commit: Commit
    kind: Literal["own", "resumed", "weights"]
    """own: the run's own. resumed: that of another run, whose history goes on. weights: nothing of it but these."""

    @property
    def hint(self) -> str:
        """What a user can do who wants another model than the checkpoint's."""
        field = {"resumed": "checkpoint.resume", "weights": "checkpoint.start"}.get(self.kind)
        return ANOTHER_RUN if field is None else f"leave {field} out"

    def check(self, data: PreparedData, config: Config, prepared: Mapping[str, Any]) -> None:
        """Refuse text that the checkpoint cannot go on with.

        A selection of subtrees is no part of what must be the same: each has its own place in the text. Sequences
        without addresses may have some from here on, since a bank may be added.

        Raises:
            CheckpointError: names the field and the remedy.
        """
        stored, run = self.commit.progress.data, self.folder.parent.parent
        if stored.get("tokenizer", data.tokenizer_fingerprint) != data.tokenizer_fingerprint:
            raise CheckpointError(
                f"data.sources: their tokenizer differs from the one {self.folder} was trained with; prepare the text "
                f"with --tokenizer {run / 'tokenizer'}, or {self.hint}"
            )
        check_manifests(self.folder, self.commit, config, prepared, self.hint)
        known = (data.fingerprint, data.sequences_fingerprint)
        if self.kind != "weights" and stored.get("fingerprint", data.fingerprint) not in known:
            fresh = {
                "own": f"start a run of another name, with checkpoint.start: {run} to begin with these weights",
                "resumed": f"begin with its weights alone: checkpoint.start: {run} in place of checkpoint.resume",
            }[self.kind]
            raise CheckpointError(
                f"data: fingerprint differs from the one {self.folder} was trained on, so the run would not continue "
                f"where it stopped; restore data.sources, data.sequence_length, data.seed and data.addresses.batching, "
                f"or {fresh}"
            )


def find_resume_point(config: CheckpointConfig, store: CheckpointStore) -> ResumePoint | None:
    """What `checkpoint.resume` and `checkpoint.start` ask for, if any. Collective.

    Another run is begun with while this run has no checkpoint of its own: a job that is started again with the same
    command goes on instead of beginning anew.

    Raises:
        CheckpointError: on every rank alike.
    """
    own, resume, start = store.steps(), config.resume, config.start
    if start is not None and _is_of(Path(start), store):
        raise CheckpointError(
            f"checkpoint.start: {start} is the folder of this run itself; give the run another name, or leave it out: "
            "checkpoint.resume goes on with a run, and goes back to a step of it"
        )
    if resume == "never" and own:
        raise CheckpointError(
            f"checkpoint.resume: never, but {store.root} holds checkpoints; choose another name or remove them"
        )
    if resume not in ("auto", "never"):
        folder = run_on_all_ranks(lambda: find_checkpoint(Path(resume)))
        if _is_of(folder, store):
            return ResumePoint(folder, store.open(folder), "own")
        if start is not None:
            raise CheckpointError(
                f"checkpoint.start: {start}, and checkpoint.resume: {resume}: a run begins with one of them; leave "
                "resume out for the weights alone, or start for all that belongs to a run"
            )
        if not own:
            return ResumePoint(folder, store.open(folder), "resumed")
    if own:
        newest = store.newest()
        assert newest is not None
        return ResumePoint(*newest, "own")
    if start is None:
        return None
    try:
        folder = run_on_all_ranks(lambda: find_checkpoint(Path(start)))
        return ResumePoint(folder, store.open(folder), "weights")
    except UserError as error:
        raise CheckpointError(f"checkpoint.start: {error}") from None


def _is_of(path: Path, store: CheckpointStore) -> bool:
    """Whether a path is the run's folder, that of its checkpoints, or that of one of them."""
    root, path = store.root.resolve(), path.resolve()
    return path in (root.parent, root) or path.parent == root
