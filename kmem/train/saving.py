"""Saving a pipeline to a checkpoint store and loading it back, on any mesh."""

from pathlib import Path

from kmem.checkpoint.commit import Commit, Progress
from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.store import CheckpointStore
from kmem.parallel.parameter_counts import tensor_shapes
from kmem.parallel.pipeline import Pipeline
from kmem.parallel.training_state import MOMENTS, check_names, finish_load, model_state


def save_training(store: CheckpointStore, pipeline: Pipeline, progress: Progress, asynchronous: bool = False) -> Path:
    """Save weights, moments and progress; collective.

    Raises:
        CheckpointError: on every rank alike.
    """
    state = model_state(pipeline, saving=True, moments=True)
    config = pipeline.config
    addressing = None if pipeline.addresses is None else pipeline.addresses.addressing.to_manifest()
    shapes = tensor_shapes(config.model)
    return store.save(state, progress, config.model_dump(mode="json"), shapes, asynchronous, addressing)


def load_training(store: CheckpointStore, folder: Path, commit: Commit, pipeline: Pipeline) -> Progress:
    """Fill a freshly built pipeline from a verified checkpoint; collective.

    A checkpoint without moments, as `kmem import` writes, leaves the optimizer as new. One without memory may be
    continued by a model with memory, whose first rows are zeros: it computes at first exactly what was trained. Its
    optimizer is new, too: Adam counts steps once for all parameters, and new ones would begin with steps too long.

    Raises:
        CheckpointError: the checkpoint is of another model; names the field or tensor.
    """
    config = pipeline.config
    check_addressing(folder, commit.addressing, pipeline.addresses)
    stored, wanted = dict(commit.config["model"]), config.model.model_dump(mode="json")
    new_memory = stored.get("engram") is None and wanted["engram"] is not None
    if new_memory:
        assert config.model.engram is not None
        if config.model.engram.init_std:
            raise CheckpointError(
                f"model.engram.init_std: {config.model.engram.init_std}, and {folder} has no memory; set it to 0, so "
                "that the memory added to the model changes nothing at first"
            )
        stored["engram"] = wanted["engram"]
    _same_model(folder, stored, wanted, "model")
    check_names(pipeline, commit.shapes, new_memory)
    with_moments = not new_memory and any(name.startswith(f"{MOMENTS[0]}/") for name in commit.tensors)
    if with_moments and pipeline.memory is not None:
        _same_rows(folder, commit.config.get("memory", {}), config.memory.model_dump(mode="json"))
    state = model_state(pipeline, saving=False, moments=with_moments)
    if new_memory:
        state = {name: pieces for name, pieces in state.items() if ".engram." not in name}
    store.load(folder, commit, state)
    finish_load(pipeline, commit.progress.optimizer_steps if with_moments else 0)
    return commit.progress


TRAINED_ONLY = {"bias_update_rate", "aux_loss", "sequence_aux_loss", "z_loss", "init_std", "depth_scaled_init"}
"""Fields of the model section that a run may change when it resumes: they shape training, not the function."""


def _same_rows(folder: Path, stored: dict, wanted: dict) -> None:
    """The state of rows fits one optimizer and one type only."""
    for path in (("dtype",), ("optimizer", "name"), ("optimizer", "dense")):
        one, other = stored, wanted
        for key in path:
            one, other = one[key], other[key]
        relevant = path[-1] != "dense" or wanted["optimizer"]["name"] == "sinkhorn_momentum"
        if one != other and relevant:
            raise CheckpointError(
                f"memory.{'.'.join(path)}: {other!r} in the configuration, {one!r} in {folder}, whose rows and their "
                "state fit no other; correct the configuration"
            )


def _same_model(folder: Path, stored: object, wanted: object, path: str) -> None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in wanted.keys() | stored.keys():
            if key not in TRAINED_ONLY:
                _same_model(folder, stored.get(key), wanted.get(key), f"{path}.{key}")
    elif stored != wanted:
        raise CheckpointError(
            f"{path}: {wanted!r} in the configuration, {stored!r} in {folder}; a checkpoint continues with its own "
            "model only: correct the configuration or start a run of another name"
        )
