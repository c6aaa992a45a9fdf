"""Held-out loss on a fixed set of sequences."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kmem.data.batch import IGNORED_LABEL, SequenceBatch
from kmem.data.reader import PreparedData
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.pipeline import Pipeline, split_samples


@dataclass(frozen=True)
class EvaluationRecord:
    """One held-out evaluation; a line of metrics.jsonl."""

    step: int
    loss: float
    """Mean cross entropy in nats per scored token."""
    bits_per_byte: float
    """loss / ln 2 / bytes per token of the validation text: comparable between tokenizers."""
    perplexity: float
    tokens: int
    """Scored tokens."""
    seconds: float
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    """Control of `evaluation.controls` -> `loss` and `bits_per_byte` of the same sequences."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "evaluation", **asdict(self)}


def held_out_loss(
    pipeline: Pipeline, data: PreparedData, sequences: int | None, controls: Mapping[str, str] | None = None
) -> tuple[float, int]:
    """(mean loss in nats, scored tokens) on the same sequences on every mesh; collective.

    Args:
        sequences: number of validation sequences, spread over the whole split; None takes all.
        controls: kind of memory -> its control; kinds that are not named are evaluated as they were trained.
    """
    given = {}
    for kind in kinds_of(pipeline.shape):
        control = (controls or {}).get(kind.name, kind.model.trained_control(pipeline.shape))
        if control != kind.model.controls[0]:
            given[kind.name] = control
    samples = data.validation.spread(sequences)
    micro_batch, ranks = pipeline.config.train.micro_batch_size, pipeline.mesh.data
    unit = micro_batch * ranks
    total, tokens = 0.0, 0
    # One schedule of bounded length at a time, since a schedule holds all its batches in memory.
    for begin in range(0, len(samples), unit * pipeline.micro_batches):
        block = samples[begin : begin + unit * pipeline.micro_batches]
        padded = -(-len(block) // unit) * unit
        plan = split_samples(0, padded, micro_batch, pipeline.mesh)
        batches = [_padded(data, [block[i] for i in places if i < len(block)], micro_batch) for places in plan]
        summed, count = pipeline.evaluate(batches, given)
        total, tokens = total + summed, tokens + count
    return total / max(tokens, 1), tokens


def _padded(data: PreparedData, samples: list[int], rows: int) -> SequenceBatch:
    """The samples, padded to `rows` with copies of a sequence whose labels do not count."""
    missing = rows - len(samples)
    batch = data.validation.read(samples + [0] * missing)
    if missing:
        batch.labels[-missing:] = torch.full_like(batch.labels[-missing:], IGNORED_LABEL)
    return batch
