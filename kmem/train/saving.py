"""Saving a pipeline to a checkpoint store and loading it back, on any mesh."""

from pathlib import Path

from kmem.checkpoint.bank.layout import bank_layout, bank_tensors
from kmem.checkpoint.bank.rows import check_held
from kmem.checkpoint.commit import Commit, Progress
from kmem.checkpoint.manifest import ANOTHER_RUN, check_addressing, check_tree
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import WEIGHT
from kmem.checkpoint.store import CheckpointStore
from kmem.config import ROW_OPTIMIZER_TRAITS, parse_config
from kmem.model.bank_layout import bank_table_name
from kmem.parallel.bank_table import BankTable
from kmem.parallel.parameter_counts import tensor_shapes
from kmem.parallel.pipeline import Pipeline
from kmem.parallel.training_state import check_names, finish_load, model_state, moment_names


def save_training(
    store: CheckpointStore,
    pipeline: Pipeline,
    progress: Progress,
    asynchronous: bool = False,
    tree: dict | None = None,
) -> Path:
    """Save weights, moments and progress; collective.

    Args:
        tree: description of the cluster tree that addresses a memory bank.

    Raises:
        CheckpointError: on every rank alike.
    """
    state = model_state(pipeline, saving=True, moments=True)
    config = pipeline.config
    addressing = None if pipeline.addresses is None else pipeline.addresses.addressing.to_manifest()
    shapes = tensor_shapes(config.model)
    partial: set[str] = set()
    if config.bank.hold == "subtrees":
        layout = bank_layout(config)
        assert layout is not None
        partial = {*bank_tensors(layout), *map(bank_table_name, layout.levels)}
    return store.save(state, progress, config.model_dump(mode="json"), shapes, asynchronous, addressing, tree, partial)


def load_training(
    store: CheckpointStore,
    folder: Path,
    commit: Commit,
    pipeline: Pipeline,
    tree: dict | None = None,
    weights_only: bool = False,
    otherwise: str = ANOTHER_RUN,
    going_on: bool = True,
) -> Progress:
    """Fill a freshly built pipeline from a verified checkpoint; collective.

    A checkpoint without moments, as `kmem import` writes, leaves the optimizer as new. One without memory may be
    continued by a model with memory:
    - n-gram memory, whose first rows are zeros: it computes at first exactly what was trained. Its optimizer is new,
      too: Adam counts steps once for all parameters, and new ones would begin with steps too long.
    - a memory bank, whose first blocks change nothing either. It adds no parameters but its tables, which count their
      own steps, so the optimizer goes on.
    The anchor of a bank may be frozen from here on, or trained again, with a new optimizer.

    Args:
        weights_only: all optimizers are new.
        otherwise: what to do where the model is meant to be another one than the checkpoint's.
        going_on: the checkpoint is the run's own.

    Raises:
        CheckpointError: the checkpoint is of another model; names the field or tensor.
    """
    config = pipeline.config
    check_addressing(folder, commit.addressing, pipeline.addresses, otherwise)
    stored, wanted = dict(commit.config["model"]), config.model.model_dump(mode="json")
    new = [name for name in ("engram", "bank") if stored.get(name) is None and wanted[name] is not None]
    if "engram" in new:
        assert config.model.engram is not None
        if config.model.engram.init_std:
            raise CheckpointError(
                f"model.engram.init_std: {config.model.engram.init_std}, and {folder} has no memory; set it to 0, so "
                "that the memory added to the model changes nothing at first"
            )
    if stored.get("bank") is not None:
        if wanted["bank"] is None:
            raise CheckpointError(
                f"{folder} holds a memory bank, and model.bank is null; keep its bank, or {otherwise}"
            )
        check_tree(folder, commit.tree, tree, otherwise)
    stored |= {name: wanted[name] for name in new}
    _same_model(folder, _rows_of_bank(stored), _rows_of_bank(wanted), "model", otherwise)
    if stored.get("bank") is not None:
        check_held(folder, parse_config(commit.config), config, going_on)
    parts = [NAME_PARTS[name] for name in new]
    check_names(pipeline, commit.shapes, parts)
    kinds = moment_names(pipeline)
    moments = any(name.startswith(f"{kinds[0]}/") for name in commit.tensors) and not weights_only
    row_state = any(name.startswith("step/") for name in commit.tensors)
    for name, section in (("engram", "engram"), ("bank", "bank")):
        if row_state and wanted[name] is not None and name not in new:
            sections = commit.config.get(section, {}), config.model_dump(mode="json")[section]
            if not weights_only:
                _same_rows(folder, section, *sections)
    row_state = row_state and not weights_only
    moments = moments and "engram" not in new and not pipeline.frozen
    state = model_state(pipeline, saving=False, moments=moments, row_state=row_state)
    state = {name: pieces for name, pieces in state.items() if not any(part in name for part in parts)}
    # Rows that were frozen with their anchor have no state, and blocks of older checkpoints no counts.
    of_rows = {name for name in state if name.partition("/")[0] not in (WEIGHT.rstrip("/"), *kinds)}
    frozen = {name for name in of_rows if f"step/{name.partition('/')[2]}" not in commit.tensors}
    uncounted = {name for name in state if name.startswith("updates/") and name not in commit.tensors} - frozen
    absent = frozen | uncounted
    state = {name: pieces for name, pieces in state.items() if name not in absent}
    if pipeline.bank_ledger is not None and row_state:
        usage = pipeline.bank_ledger.usage.state(saving=False)
        state |= {name: pieces for name, pieces in usage.items() if name in commit.tensors}
    store.load(folder, commit, state, rounding=weights_only)
    if uncounted:
        assert pipeline.stage_tables is not None
        pipeline.stage_tables.count_updates()
    if "bank" in new:
        assert pipeline.stage_tables is not None
        pipeline.stage_tables.initialise(BankTable)
    finish_load(pipeline, commit.progress.optimizer_steps if moments else 0)
    return commit.progress


NAME_PARTS = {"engram": ".engram.", "bank": ".bank."}
"""Section of the model -> what the names of its tensors have in common."""
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


def _rows_of_bank(model: dict) -> dict:
    """The section with what decides whether a bank has generic blocks in place of how often they are trained."""
    bank = model.get("bank")
    if bank is None:
        return model
    generic = {**bank["generic"], "probability": "above 0" if bank["generic"]["probability"] > 0 else 0}
    return {**model, "bank": {**bank, "generic": generic}}


def _same_rows(folder: Path, section: str, stored: dict, wanted: dict) -> None:
    """The state of rows fits one optimizer and one type only."""
    for path in (("dtype",), ("optimizer", "name"), ("optimizer", "dense")):
        one, other = stored, wanted
        for key in path:
            one, other = one[key], other[key]
        relevant = path[-1] != "dense" or ROW_OPTIMIZER_TRAITS[wanted["optimizer"]["name"]].balances
        if one != other and relevant:
            raise CheckpointError(
                f"{section}.{'.'.join(path)}: {other!r} in the configuration, {one!r} in {folder}, whose rows and "
                "their state fit no other; correct the configuration, or begin with the weights alone "
                "(checkpoint.start)"
            )


def _same_model(folder: Path, stored: object, wanted: object, path: str, otherwise: str) -> None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in wanted.keys() | stored.keys():
            if key not in TRAINED_ONLY:
                _same_model(folder, stored.get(key), wanted.get(key), f"{path}.{key}", otherwise)
    elif stored != wanted:
        raise CheckpointError(
            f"{path}: {wanted!r} in the configuration, {stored!r} in {folder}; a checkpoint goes on with its own model "
            f"only: correct the configuration, or {otherwise}"
        )
