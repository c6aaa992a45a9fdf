"""The training state of one rank as pieces of global tensors, for every optimizer that DeepSpeed may choose.

    weight/NAME       fp32 master weights, and persistent buffers such as selection biases
    exp_avg/NAME      first moments
    exp_avg_sq/NAME   second moments
    ARRAY/NAME        for a table: the state of its row optimizer, such as first_moment, and its `step`; for a bank,
                      whose tables span the layers of a stage, NAME is the name of one layer's blocks
    hits/bank, ..     other state of a kind of memory (`StageMemory.state`)

NAME is canonical. bf16 weights are not stored: they are the cast of the masters. Adam's step counter is one number,
since every parameter is updated in every step.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param

from kmem.checkpoint.commit import WEIGHT
from kmem.checkpoint.pieces import Pieces
from kmem.parallel.gradients import is_tied_copy
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS
from kmem.parallel.pipeline import Pipeline


def model_state(pipeline: Pipeline, *, saving: bool, moments: bool, row_state: bool | None = None) -> dict[str, Pieces]:
    """The pieces that this rank saves, or loads into in place.

    Args:
        saving: leave out copies that another rank of the pipeline saves (tied weights).
        moments: include optimizer moments; before the first step they are created as zeros. A frozen anchor has none.
        row_state: include the state of the tables' row optimizers; default: as `moments`.
    """
    row_state = moments if row_state is None else row_state
    moments = moments and not pipeline.frozen
    if moments:
        _create_moments(pipeline)
    state = dict(_fragments(pipeline, saving=saving, moments=moments))
    for name, buffer in pipeline.named_buffers():
        state[WEIGHT + name] = Pieces.interval(buffer.numel(), 0, buffer)
    tables = pipeline.stage_tables.pieces(saving)
    for name, arrays in tables.items():
        state[WEIGHT + name] = arrays.pop("rows")
        if row_state:
            state |= {f"{array}/{name}": pieces for array, pieces in arrays.items()}
    if saving:
        for memory in pipeline.context.memories:
            state |= memory.state(saving=True)
    return state


def moment_names(pipeline: Pipeline) -> tuple[str, ...]:
    """Names of the optimizer's state for every parameter."""
    return BACKBONE_OPTIMIZERS[pipeline.config.train.optimizer.name].moments


def optimizer_steps(pipeline: Pipeline) -> int:
    """Updates that the moments have accumulated, the same for every parameter; 0 for a frozen anchor."""
    if pipeline.frozen:
        return 0
    counters = {int(state["step"]) for state in _adam(pipeline).state.values() if "step" in state}
    assert len(counters) <= 1, f"Adam counters differ: {counters}"
    return counters.pop() if counters else 0


def finish_load(pipeline: Pipeline, steps: int) -> None:
    """Once the pieces are filled: set Adam's counters, and copy the masters to the compute weights."""
    for state in _adam(pipeline).state.values():
        state["step"].fill_(steps)
    update = getattr(pipeline.engine.optimizer, "update_lp_params", None)
    if update is not None:
        update()


def _adam(pipeline: Pipeline) -> torch.optim.Optimizer:
    optimizer: Any = pipeline.engine.optimizer  # DeepSpeed's wrapper around AdamW, or AdamW itself
    return getattr(optimizer, "optimizer", optimizer)


def _create_moments(pipeline: Pipeline) -> None:
    """Give the optimizer the state that it would create at its first step."""
    adam, kinds = _adam(pipeline), moment_names(pipeline)
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    **{kind: torch.zeros_like(parameter, requires_grad=False) for kind in kinds},
                )


def _fragments(pipeline: Pipeline, *, saving: bool, moments: bool) -> Iterator[tuple[str, Pieces]]:
    """(`weight/NAME` or the name of a moment, live view of the interval that this rank's optimizer updates), for every
    parameter."""
    adam, mesh, kinds = _adam(pipeline), pipeline.mesh, moment_names(pipeline)
    partitioned = adam is not pipeline.engine.optimizer
    for name, parameter in pipeline.named_parameters():
        if saving and is_tied_copy(parameter):
            continue
        shards, shard = (mesh.expert, mesh.expert_rank) if is_moe_param(parameter) else (1, 0)
        size, start = parameter.numel() * shards, parameter.numel() * shard
        if partitioned:
            fragment = getattr(parameter, "_hp_mapping", None)
            if fragment is None:  # none of it lies in this rank's partition
                continue
            # Not fragment.optim_fragment: DeepSpeed fills that for the first parameter group only.
            holder = adam.param_groups[fragment.param_group_index]["params"][0]
            place, start = fragment.hp_fragment_address, start + fragment.lp_fragment_address.start
            cut = slice(place.start, place.start + place.numel)
            values = {"weight": holder.detach()[cut]}
            if moments:
                values |= {kind: adam.state[holder][kind][cut] for kind in kinds}
        else:
            values = {"weight": parameter.detach().view(-1)}
            if moments:
                values |= {kind: adam.state[parameter][kind].view(-1) for kind in kinds}
        for kind, view in values.items():
            yield f"{kind}/{name}", Pieces.interval(size, start, view)
