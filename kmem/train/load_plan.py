"""What a run takes over from a checkpoint. Names and configurations alone decide it, before a tensor is touched."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmem.checkpoint.commit import WEIGHT, Commit
from kmem.checkpoint.manifest import ANOTHER_RUN
from kmem.checkpoint.pieces import CheckpointError
from kmem.config import ROW_OPTIMIZER_TRAITS, Config
from kmem.model.memory_kinds import owner_of
from kmem.model.parameter_counts import tensor_shapes
from kmem.parallel.memory_kinds import KINDS, kinds_of
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS

TRAINED_ONLY = {
    "bias_update_rate",
    "aux_loss",
    "sequence_aux_loss",
    "z_loss",
    "balance_padding",
    "init_std",
    "depth_scaled_init",
    "anchor",
    "per",
}
"""Fields of the model section that a run may change when it resumes: they shape training, not the function."""


@dataclass(frozen=True)
class LoadPlan:
    """Which parts of a run's state are loaded, start anew or are drawn."""

    added: frozenset[str]
    """Kinds of memory that the checkpoint does not have."""
    drawn: frozenset[str]
    """Added kinds whose rows are drawn as in a new run; the rows of other added kinds stay zeros."""
    weights_only: bool
    """All optimizers start anew, and weights may have another dtype than the stored ones."""
    moments: bool
    """Whether the state of the backbone's optimizer is loaded; it starts anew otherwise."""
    moment_names: tuple[str, ...]
    """Names of that optimizer's state."""
    stored: Collection[str]
    """Names of everything that the checkpoint holds."""

    @property
    def row_state(self) -> bool:
        """Whether the state of any row optimizer is loaded."""
        return not self.weights_only and any(name.startswith("step/") for name in self.stored)

    def loads(self, name: str) -> bool:
        """Whether a part of the run's state, such as `weight/NAME` or `exp_avg/NAME`, is loaded."""
        array, _, tensor = name.partition("/")
        if owner_of(tensor) in self.added:
            return False
        if array == WEIGHT.rstrip("/"):
            return True
        if array in self.moment_names:
            return self.moments
        return self._has_row_state(tensor) and not self.counts_updates(name)

    def counts_updates(self, name: str) -> bool:
        """Whether this is a table's count of updates per row, and the checkpoint lacks it: its rows did not count."""
        array, _, tensor = name.partition("/")
        return array == "updates" and self._has_row_state(tensor) and name not in self.stored

    def _has_row_state(self, table: str) -> bool:
        """Whether a table's row state is loaded. Rows that were frozen with their anchor have none."""
        return not self.weights_only and f"step/{table}" in self.stored


def plan_load(
    folder: Path,
    commit: Commit,
    config: Config,
    prepared: Mapping[str, Any],
    *,
    weights_only: bool = False,
    hint: str = ANOTHER_RUN,
    own_run: bool = True,
) -> LoadPlan:
    """Check that a run can begin with a checkpoint, and decide what it takes over.

    If the checkpoint has no moments, as `kmem import` writes it, the optimizer starts anew. A model may have memories
    that the checkpoint lacks: they change nothing at first. The anchor of a bank may be frozen from here on, or trained
    again with a new optimizer.

    Args:
        prepared: kind of memory -> result of its `MemoryKind.prepare`.
        weights_only: all optimizers start anew.
        hint: remedy for a user who means another model than the checkpoint's.
        own_run: whether it is a checkpoint of this run, which later checkpoints replace.

    Raises:
        CheckpointError: the checkpoint belongs to another model; names the field or tensor.
    """
    stored, wanted = dict(commit.config["model"]), config.model.model_dump(mode="json")
    kinds = kinds_of(config.model.shape)
    check_manifests(folder, commit, config, prepared, hint)
    for name in KINDS:
        if stored.get(name) is not None and wanted.get(name) is None:
            raise CheckpointError(f"{folder} holds the rows of model.{name}, which is null here; keep it, or {hint}")
    added = [kind for kind in kinds if stored.get(kind.name) is None]
    for kind in added:
        kind.check_added(config, folder)
    stored |= {kind.name: wanted[kind.name] for kind in added}
    for kind in kinds:
        stored[kind.name], wanted[kind.name] = (kind.compared(model[kind.name]) for model in (stored, wanted))
    same_model(folder, stored, wanted, "model", hint)
    kept = [kind for kind in kinds if kind not in added]
    for kind in kept:
        kind.check_stored(folder, commit, config, own_run)
    names = frozenset(kind.name for kind in added)
    for name in tensor_shapes(config.model.shape):
        if name not in commit.shapes and owner_of(name) not in names:
            raise CheckpointError(f"{name} is not in {folder}; {hint}")
    moment_names = BACKBONE_OPTIMIZERS[config.train.optimizer.name].moments
    plan = LoadPlan(
        added=names,
        drawn=frozenset(kind.name for kind in added if kind.draws_added_rows),
        weights_only=weights_only,
        moments=(
            not weights_only
            and not config.model.frozen_anchor
            and not any(kind.restarts_backbone_optimizer for kind in added)
            and any(name.startswith(f"{moment_names[0]}/") for name in commit.tensors)
        ),
        moment_names=moment_names,
        stored=commit.tensors,
    )
    if plan.row_state:
        for kind in kept:
            settings = config.model_dump(mode="json")[kind.name]
            _same_rows(folder, kind.name, commit.config.get(kind.name, {}), settings)
    return plan


def check_manifests(
    folder: Path, commit: Commit, config: Config, prepared: Mapping[str, Any], hint: str = ANOTHER_RUN
) -> None:
    """Refuse rows that would be read for other text than they were trained with.

    Raises:
        CheckpointError: names every field that differs.
    """
    for kind in kinds_of(config.model.shape):
        if kind.name in commit.manifests:
            kind.check_manifest(folder, commit.manifests[kind.name], prepared.get(kind.name), hint)


def same_model(folder: Path, stored: object, wanted: object, path: str, hint: str) -> None:
    """Check that two model sections agree in all fields but TRAINED_ONLY.

    Raises:
        CheckpointError: names the first field that differs.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(wanted.keys() | stored.keys()):
            if key not in TRAINED_ONLY:
                same_model(folder, stored.get(key), wanted.get(key), f"{path}.{key}", hint)
    elif stored != wanted:
        raise CheckpointError(
            f"{path}: {wanted!r} in the configuration, {stored!r} in {folder}; a checkpoint continues only with its "
            f"own model: correct the configuration, or {hint}"
        )


def _same_rows(folder: Path, section: str, stored: dict, wanted: dict) -> None:
    """Check that rows keep their optimizer and dtype: row state fits no others."""
    for path in (("dtype",), ("optimizer", "name"), ("optimizer", "dense")):
        one, other = stored, wanted
        for key in path:
            one, other = one[key], other[key]
        relevant = path[-1] != "dense" or ROW_OPTIMIZER_TRAITS[wanted["optimizer"]["name"]].balances
        if one != other and relevant:
            raise CheckpointError(
                f"{section}.{'.'.join(path)}: {other!r} in the configuration, {one!r} in {folder}, whose rows and "
                "row state fit no other; correct the configuration, or begin with only the weights "
                "(checkpoint.start)"
            )
