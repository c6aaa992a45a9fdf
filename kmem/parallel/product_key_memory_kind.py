"""Product-key memory in training. Layers look the pool up in the forward pass, on the main thread and in the order of
the schedule; the ranks of a stage share its rows.

Every stage with such layers has a copy of the pool. After the backward pass, the owners sum the gradients of each layer
over the ranks of its stage and send the sums to the owners of the same rows on the other stages. All copies add them in
the order of the layers, so they stay equal, and equal to the one pool of a pipeline with one stage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.pieces import CheckpointError
from kmem.config import Config
from kmem.data.batch import SequenceBatch
from kmem.model.product_key_memory import TABLE, Pool, ProductKeyMemoryKind, shuffled
from kmem.model.recomputation import recomputing
from kmem.parallel.kind_table import KindTable
from kmem.parallel.memory_kind import BegunStep, MemoryKind, MemoryPlan, StageMemory, StageParts
from kmem.parallel.mesh import Mesh, local_device
from kmem.parallel.stages import stages_with
from kmem.parallel.table_bytes import TableBytes
from kmem.tables.exchange import Exchange, join_groups
from kmem.tables.row_optimizers.update import sum_by_row
from kmem.tables.table import Table
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class ProductKeyMemoryTraining(MemoryKind):
    """The pool in training."""

    model = ProductKeyMemoryKind()
    restarts_backbone_optimizer = True

    def stage(self, parts: StageParts, prepared: Any) -> "StagePool":
        return StagePool(parts)

    def check_added(self, config: Config, folder: Path) -> None:
        raise CheckpointError(
            f"model.product_key_memory: {folder} has none, and it replaces the feed-forward of layers; leave it out, "
            "or train from the start"
        )

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        """The copy of this stage. Every look-up of a layer for a micro-batch has a working set of its own, from the
        forward to the backward pass. The gradients of a layer are then added to its sums."""
        shape = config.model.shape
        own = [layer for layer in self.model.layers(shape) if layer in layers]
        if not own:
            return []
        (table,) = self.model.tables(shape).values()
        tokens = config.train.micro_batch_size * config.data.sequence_length
        look_ups = tokens * self.model.row_values(shape, own[0]) // table.width
        once = TableBytes.of(
            self.name, "layer", own[0], self.settings(config), self.optimizer(config), mesh, table.rows, table.width,
            look_ups, look_ups,
        )  # fmt: skip
        micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * mesh.data)
        in_flight = min(micro_batches, mesh.pipeline - stages_with(config, mesh, own)[0])
        gradient = min(look_ups, table.rows) * table.width * torch.float32.itemsize
        summed = min(micro_batches * look_ups, table.rows)
        return [
            replace(
                once,
                working_set=in_flight * len(own) * (once.working_set - gradient) + gradient,
                host_buffers=len(own) * summed * (table.width * torch.float32.itemsize + torch.int64.itemsize),
            )
        ]

    def imagined_read(self, config: Config, layer: int) -> Pool:
        return lambda ids, weights: weights.sum((1, 2))[:, None].expand(-1, config.model.hidden_size)


class StagePool(StageMemory):
    """The pool of a stage, which may have no layers that use it."""

    kind = ProductKeyMemoryKind.name

    def __init__(self, parts: StageParts) -> None:
        config, mesh = parts.config, parts.mesh
        seconds = config.parallel.timeout_seconds
        self.context, self.shape = parts.context, parts.shape
        self.layers = sorted(parts.modules.get(self.kind, {}))
        self.all_layers = KIND.model.layers(parts.shape)
        stages = [range(stage * mesh.data, (stage + 1) * mesh.data) for stage in range(mesh.pipeline)]
        exchange = Exchange(join_groups(stages, seconds))
        self._optimizer = KIND.optimizer(config)
        using = {layer: stages_with(config, mesh, [layer])[0] for layer in self.all_layers}
        self._holders = {layer: stage * mesh.data + mesh.data_rank for layer, stage in using.items()}
        """Layer -> the rank of its stage that owns the same rows as this one."""
        sharing = sorted(set(using.values()))
        self._copies = join_groups(
            [[stage * mesh.data + rank for stage in sharing] for rank in range(mesh.data)], seconds
        )
        if self.layers:
            self.tables = [KindTable(KIND, config, TABLE, exchange, is_copy=self.layers[0] != self.all_layers[0])]
        # On the device: reading weights on the host would wait for every look-up once more.
        rows = KIND.model.tables(parts.shape)[TABLE].rows
        self._usage = torch.zeros(rows, dtype=torch.float64, device=local_device())
        """Weight that each row has had in this rank's look-ups since the run began or was resumed."""
        self._top = torch.zeros(2, dtype=torch.float64, device=local_device())
        """Sum of the largest weights of queries, and number of queries."""

    def start(self, tables: Mapping[str, Table]) -> None:
        self._table = tables.get(TABLE)
        self._begin_sums()

    def _begin_sums(self) -> None:
        width = self.shape.hidden_size
        self._sums = {layer: (np.zeros(0, np.int64), np.zeros((0, width), np.float32)) for layer in self.layers}
        """Layer -> distinct rows that it looked up in this step, ascending, and the sums of their gradients. The
        backward passes add to them in the order of the micro-batches."""

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        return MemoryPlan({})

    def read(self, layer: int, context: "StepContext") -> Pool:
        pool: Pool = partial(self._look_up, layer, context.running)
        return shuffled(pool, self.shape) if context.controls.get(self.kind) == "shuffled" else pool

    def _look_up(self, layer: int, micro_batch: int, ids: Tensor, weights: Tensor) -> Tensor:
        table, training = self._table, self.context.recording
        assert table is not None
        name = _look_up_name(layer, micro_batch)
        working_set = self.context.working_sets.get(name)  # of the forward pass, when it is recomputed
        if working_set is None or not training:
            plan = StepPlan.of([ids.cpu()])
            working_set = table.evaluate(lambda: plan, trainable=training and table.trained)
        if training:
            self.context.working_sets[name] = working_set
        if training and weights.requires_grad:
            weights.register_hook(lambda _: self._add_gradient(layer, name))  # its gradient follows that of the rows
        if training and not recomputing():
            used = weights.detach().double()
            self._usage.index_add_(0, ids.flatten(), used.flatten())
            self._top[0] += used.max(-1).values.sum()
            self._top[1] += used.shape[0] * used.shape[1]
        return working_set.weighted(0, weights)

    def _add_gradient(self, layer: int, name: str) -> None:
        """Add the gradient of a look-up, and release its rows."""
        working_set = self.context.working_sets.pop(name)
        if working_set.gradient is not None:
            rows, sums = self._sums[layer]
            gradient = working_set.gradient.cpu().numpy()
            self._sums[layer] = sum_by_row(np.concatenate([rows, working_set.asked]), np.concatenate([sums, gradient]))

    def finite(self) -> bool:
        return all(np.isfinite(sums.sum()) for _, sums in self._sums.values())  # inf and NaN survive the sum

    def commit(self, scale: float, learning_rate: float) -> None:
        table, optimizer = self._table, self._optimizer
        if table is None or optimizer is None:
            return
        sums = {layer: table.owner_sums(*self._sums[layer]) for layer in self.layers}
        self._begin_sums()
        if self._copies is not None:
            for layer, source in self._holders.items():
                sums[layer] = _broadcast(sums.get(layer), source, self._copies, table.spec.dim)
        rows, gradients = (np.concatenate([sums[layer][part] for layer in self.all_layers]) for part in (0, 1))
        table.update(rows, gradients, scale, learning_rate * optimizer.lr_multiplier)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """In sampled steps, under "pool", figures of all look-ups since the run began or was resumed:

        used_share      share of the rows that any token has looked up
        usage_kl        divergence of the rows' weights from equal weights, in nats; 0 if all rows are used alike
        top_weight      mean of the largest weight of a query
        """
        if not sampled:
            return {}
        numbers = torch.cat((self._usage, self._top))
        dist.all_reduce(numbers)
        usage, (top, queries) = numbers[:-2], numbers[-2:].tolist()
        shares = usage / usage.sum().clamp_min(1e-30)
        return {
            "pool": {
                "used_share": float((usage > 0).double().mean()),
                "usage_kl": float(torch.special.xlogy(shares, shares).sum()) + math.log(len(usage)),
                "top_weight": top / max(queries, 1),
            }
        }


def _look_up_name(layer: int, micro_batch: int) -> str:
    return f"{TABLE}/layer {layer}/micro-batch {micro_batch}"


def _broadcast(
    own: tuple[np.ndarray, np.ndarray] | None, source: int, group: dist.ProcessGroup, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n] and sums [n, width] of the rank `source`, which passes them as `own`."""
    count = torch.tensor([0 if own is None else len(own[0])])
    dist.broadcast(count, source, group=group)
    rows = torch.empty(int(count), dtype=torch.int64)
    sums = torch.empty(int(count), width)
    if own is not None:
        rows, sums = torch.from_numpy(own[0]), torch.from_numpy(own[1])
    dist.broadcast(rows, source, group=group)
    dist.broadcast(sums, source, group=group)
    return rows.numpy(), sums.numpy()


KIND = ProductKeyMemoryTraining()
