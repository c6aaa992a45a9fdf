"""Where a run begins: with its own checkpoint, with another run's checkpoint, or with another run's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kmem.checkpoint.commit import COMMIT_FILE, Commit
from kmem.checkpoint.manifest import ANOTHER_RUN
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import find_checkpoint
from kmem.checkpoint.store import CheckpointStore
from kmem.config import CheckpointConfig, Config, UserError
from kmem.data.reader import PreparedData
from kmem.model.file_digest import file_digest
from kmem.parallel.mesh import run_on_all_ranks
from kmem.train.load_plan import check_manifests


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run begins with."""

    folder: Path
    commit: Commit
    kind: Literal["own", "resumed", "weights"]
    """own: the run's own checkpoint. resumed: another run's checkpoint, which the run continues. weights: another run's
    checkpoint, of which only the weights are used."""

    @property
    def hint(self) -> str:
        """Remedy for a user who means another model than the checkpoint's."""
        field = {"resumed": "checkpoint.resume", "weights": "checkpoint.start"}.get(self.kind)
        return ANOTHER_RUN if field is None else f"leave {field} out"

    @property
    def identity(self) -> str:
        """Step, and digest of the commit file, which has the digests of all others."""
        return f"step {self.commit.progress.step} ({file_digest(self.folder / COMMIT_FILE)[:12]})"

    def check(self, data: PreparedData, config: Config, prepared: Mapping[str, Any]) -> None:
        """Refuse text that the checkpoint cannot continue with.

        The selection of subtrees may differ: each selection has its own place in the text. Sequences without addresses
        may have addresses from here on, since a bank may be added.

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
                "own": f"start a run under another name, with checkpoint.start: {run} to begin with these weights",
                "resumed": f"begin with only its weights: checkpoint.start: {run} in place of checkpoint.resume",
            }[self.kind]
            raise CheckpointError(
                f"data: fingerprint differs from the one {self.folder} was trained on, so the run would not continue "
                f"where it stopped; restore data.sources, data.sequence_length, data.seed and data.addresses.batching, "
                f"or {fresh}"
            )


def find_resume_point(config: CheckpointConfig, store: CheckpointStore) -> ResumePoint | None:
    """The checkpoint that `checkpoint.resume` and `checkpoint.start` ask for, if any. Collective.

    A run begins with another run's checkpoint only while it has none of its own: a job that is started again with the
    same command continues instead of beginning anew.

    Raises:
        CheckpointError: on all ranks alike.
    """
    own, resume, start = store.steps(), config.resume, config.start
    if start is not None and _is_of(Path(start), store):
        raise CheckpointError(
            f"checkpoint.start: {start} is the folder of this run itself; give the run another name, or leave it out: "
            "checkpoint.resume continues a run, or goes back to one of its steps"
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
                "resume out to take only the weights, or start to continue the whole run"
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
    """Whether a path is the run's folder, its folder of checkpoints, or one of its checkpoints."""
    root, path = store.root.resolve(), path.resolve()
    return path in (root.parent, root) or path.parent == root
