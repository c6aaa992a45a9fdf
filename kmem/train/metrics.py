"""Figures of a step: FLOPs per token, utilisation, memory, balance of the experts."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kmem.config import Config, GroupedQueryAttention
from kmem.model.parameter_counts import ParameterCounts
from kmem.parallel.mesh import local_device
from kmem.parallel.pipeline import StepResult
from kmem.parallel.routing_ledger import StepRouting

if TYPE_CHECKING:
    from kmem.train.trainer import Trainer

BALANCE_LOSSES = ("aux_loss", "sequence_aux_loss", "z_loss")

PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Part of the device's name -> dense bf16 peak in FLOP/s (vendor data sheets)."""


@dataclass
class StepRecord:
    """Figures of one optimizer step; a line of metrics.jsonl."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean cross entropy in nats over the step's trained tokens."""
    grad_norm: float
    """Global 2-norm of the gradients before clipping."""
    lr: float
    tokens: int
    """Trained tokens since the run began."""
    consumed_samples: int
    """Sequences since the run began."""
    seconds: float
    """Wall clock of the step."""
    tokens_per_second: float
    """Positions computed per second over all ranks, trained or not."""
    model_flops: float
    """FLOPs of the model per second over all ranks, without recomputation."""
    mfu: float | None
    """Share of the devices' peak; None if the peak is unknown."""
    memory_gib: float
    """Peak memory of this rank: on the GPU, or resident in the process."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, as the host sees them."""
    aux_loss: float = 0.0
    sequence_aux_loss: float = 0.0
    z_loss: float = 0.0
    """Sums over layers and passes of the auxiliary losses before their coefficients."""
    experts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per MoE layer: load_max_over_mean, load_entropy, router_entropy, dropped. A chain of experts has an entry
    "layer/iteration" per pass, with its balance losses, update_size (mean of |x_{t+1} - x_t| / |x_t|) and, from the
    second pass on, overlap (share of choices that the previous pass also made for the same token)."""
    coactivation: dict[str, list[list[int]]] = field(default_factory=dict)
    """For a chain of experts, in steps before a held-out evaluation: "layer/iteration" -> number of tokens that chose
    both experts, [expert of the previous pass][expert of this pass]."""

    memories: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Kind of memory -> layer or level -> figures: those that its `StageMemory.close_step` documents."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "step", **asdict(self)}


def step_record(trainer: Trainer, result: StepResult, lr: float, seconds: float) -> StepRecord:
    """What the step that a trainer has just done shows on this rank."""
    config = trainer.config
    positions = config.train.global_batch_size * config.data.sequence_length
    speed = positions * flops_per_token(config, trainer.counts) / seconds
    peak = device_peak_flops(config.train.precision)
    record = StepRecord(
        step=trainer.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        tokens=trainer.tokens,
        consumed_samples=trainer.consumed_samples,
        seconds=seconds,
        tokens_per_second=positions / seconds,
        model_flops=speed,
        mfu=None if peak is None else speed / (peak * trainer.mesh.world),
        memory_gib=peak_memory_gib(),
        memories=result.memories,
    )
    if result.routing is not None:
        moe, means = config.model.moe, result.routing.means
        assert moe is not None
        record.aux_loss, record.sequence_aux_loss, record.z_loss = (float(means[name].sum()) for name in BALANCE_LOSSES)
        record.experts = expert_figures(result.routing, positions * moe.top_k, chained=moe.chain is not None)
        record.coactivation = coactivation(result.routing)
    return record


def flops_per_token(config: Config, counts: ParameterCounts) -> float:
    """FLOPs of one trained token, forward and backward: 6 per active matrix element, and attention scores and sums over
    a causal context (half the sequence on average)."""
    attention = config.model.attention
    if isinstance(attention, GroupedQueryAttention):
        width = 2 * (attention.head_dim or config.model.hidden_size // attention.num_heads)
    else:
        width = attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
    context = config.data.sequence_length / 2
    scores = 6 * config.model.num_layers * attention.num_heads * width * context
    return 6.0 * (sum(counts.layers) + counts.head) + scores


def device_peak_flops(precision: str) -> float | None:
    """Dense bf16 peak of this rank's device in FLOP/s; None if it is unknown, and in fp32, where it depends on TF32."""
    if precision != "bf16" or local_device().type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def expert_figures(routing: StepRouting, chosen: int, chained: bool) -> dict[str, dict[str, float]]:
    """Balance per MoE layer, or per layer and iteration of a chain of experts.

    Args:
        routing: routing of the step; rows of dense layers are zero and left out.
        chosen: expert choices of one pass in the step (positions x top_k); choices that reached no expert are dropped.
        chained: whether the layers are chains.

    load_entropy is the entropy of the load relative to an even one: 1 is perfect balance.
    """
    figures = {}
    for name, layer, iteration in _passes(routing, chained):
        load = routing.counts[layer, iteration]
        means = {mean: float(values[layer, iteration]) for mean, values in routing.means.items()}
        entropy = torch.special.entr(load / load.sum()).sum() / math.log(max(len(load), 2))
        figures[name] = {
            "load_max_over_mean": float(load.max() / load.mean()),
            "load_entropy": float(entropy) if len(load) > 1 else 1.0,
            "router_entropy": means["entropy"],
            "dropped": float(chosen - routing.excluded[layer, iteration] - load.sum()),
        }
        if chained:
            shown = [*BALANCE_LOSSES, "update_size", *(["overlap"] if iteration else [])]
            figures[name] |= {mean: means[mean] for mean in shown}
    return figures


def coactivation(routing: StepRouting) -> dict[str, list[list[int]]]:
    """Pairs of experts in consecutive iterations, per layer and later iteration; empty if the step has none."""
    if routing.coactivation is None:
        return {}
    return {
        name: routing.coactivation[layer, iteration - 1].long().tolist()
        for name, layer, iteration in _passes(routing, chained=True)
        if iteration
    }


def _passes(routing: StepRouting, chained: bool) -> Iterator[tuple[str, int, int]]:
    """(name, layer, iteration) of every pass through experts."""
    for layer, iterations in enumerate(routing.counts):
        for iteration in range(len(iterations)):
            if iterations.sum():
                yield f"{layer}/{iteration}" if chained else str(layer), layer, iteration
