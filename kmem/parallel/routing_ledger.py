"""The choices of the routers in a step, summed over micro-batches, data-parallel ranks and stages.

One small all-reduce serves the loss-free balancing bias, which needs the load of the whole global batch, and the
metrics.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.model.balance import RoutingStatistics, updated_selection_bias
from kmem.model.chain_of_experts import ChainOfExperts, IterationStatistics
from kmem.model.moe import ExpertLayer
from kmem.model.router import Router
from kmem.model.shape import Shape
from kmem.parallel.mesh import Mesh, local_device
from kmem.parallel.step_context import StepContext

_ROUTING: tuple[str, ...] = ("aux_loss", "sequence_aux_loss", "z_loss", "entropy")
_CHAIN = ("update_size", "overlap")
_MEANS: tuple[str, ...] = (*_ROUTING, *_CHAIN)


@dataclass(frozen=True)
class StepRouting:
    """Routing of one optimizer step. L layers of the model, C passes through the experts of a layer (1 in a MoE layer),
    E experts; rows of dense layers are zero."""

    counts: Tensor
    """[L, C, E] fp64: tokens sent to each expert, over the whole global batch."""
    means: dict[str, Tensor]
    """[L, C] fp64, means over micro-batches: `aux_loss`, `sequence_aux_loss`, `z_loss` before their coefficients,
    `entropy` of the router's scores in nats; for a chain of experts also `update_size` and `overlap` as in
    `IterationStatistics`."""
    excluded: Tensor
    """[L, C] fp64: choices of padding, which the counts exclude."""
    coactivation: Tensor | None = None
    """[L, C - 1, E, E] fp64: tokens that chose one expert in an iteration and another in the next, over the whole
    global batch; None in steps that do not collect it."""


class RoutingLedger:
    """Collects statistics from the MoE layers of this stage."""

    def __init__(self, layers: dict[int, ExpertLayer], shape: Shape, mesh: Mesh, context: StepContext):
        self.layers = layers
        self.mesh = mesh
        self.context = context
        self.num_experts = experts = shape.moe.num_experts
        self.num_layers = shape.num_layers
        self.iterations = 1 if shape.chain is None else shape.chain.iterations
        # On the device: reading a count on the host would wait for every layer of every micro-batch.
        self._sums = torch.zeros(
            self.num_layers, self.iterations, experts + len(_MEANS) + 1, dtype=torch.float64, device=local_device()
        )
        self._pairs: Tensor | None = None
        for index, layer in layers.items():
            layer.on_routing = partial(self._record, index)

    def begin_step(self, coactivation: bool) -> None:
        """Choose whether to collect the co-activation of iterations in this step; the same on every rank."""
        size = (self.num_layers, self.iterations - 1, self.num_experts, self.num_experts)
        wanted = coactivation and self.iterations > 1
        self._pairs = torch.zeros(size, dtype=torch.float64, device=local_device()) if wanted else None
        for layer in self.layers.values():
            if isinstance(layer, ChainOfExperts):
                layer.observe_coactivation = wanted

    def _record(self, index: int, statistics: RoutingStatistics) -> None:
        if not self.context.recording:  # a recomputation or an evaluation
            return
        iteration, means = 0, _ROUTING
        if isinstance(statistics, IterationStatistics):
            iteration, means = statistics.iteration, _MEANS
            if statistics.coactivation_EE is not None:
                assert self._pairs is not None
                self._pairs[index, iteration - 1] += statistics.coactivation_EE
        row = self._sums[index, iteration]
        row[: self.num_experts] += statistics.counts_E.to(row)
        for place, name in enumerate(means):
            row[self.num_experts + place] += getattr(statistics, name).to(row)
        row[-1] += statistics.excluded.to(row)

    def close_step(self, micro_batches: int) -> StepRouting:
        """Sum the step over all ranks and start the next one. Collective over the world."""
        total = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(total)
        total = total.cpu()
        means = total[..., self.num_experts : -1] / (micro_batches * self.mesh.data)
        if self._pairs is not None:
            dist.all_reduce(self._pairs)
        pairs, self._pairs = self._pairs, None
        return StepRouting(
            counts=total[..., : self.num_experts],
            means=dict(zip(_MEANS, means.unbind(-1), strict=True)),
            excluded=total[..., -1],
            coactivation=None if pairs is None else pairs.cpu(),
        )

    def update_biases(self, routing: StepRouting, rate: float) -> None:
        """Loss-free balancing: move each selection bias of this stage by `rate` towards an even load.

        A router that serves several iterations has one bias, which follows their summed load.
        """
        for index, layer in self.layers.items():
            loads: dict[Router, Tensor] = {}
            for router, counts_E in zip(layer.iteration_routers(), routing.counts[index], strict=True):
                loads[router] = loads[router] + counts_E if router in loads else counts_E
            for router, counts_E in loads.items():
                bias = router.selection_bias
                if bias is not None:
                    bias.copy_(updated_selection_bias(bias, counts_E.to(bias.device), rate))
