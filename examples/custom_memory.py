"""A memory of one's own: one learned vector per token id, added at the entrance of some layers.

    python examples/custom_memory.py

The vectors are rows of tables: sharded over ranks, fetched ahead, and updated only where a step read them. A kind has
two halves with one name. The model half says what it computes and which tables it has; the training half plans which
rows a step reads. The name is also that of its two sections of the configuration: `model.token_vectors` is the memory,
and `token_vectors` says how its tables are kept.

Held-out evaluation, checkpoints and resuming work in runs that are started from a file like this one. `kmem eval` and
exports know the kinds of the package only.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import torch
from small_corpus import small_corpus, small_run
from torch import Tensor

from kmem.config import Config, ModelConfig, TableConfig
from kmem.config.section import Section
from kmem.data.batch import SequenceBatch
from kmem.data.reader import open_data
from kmem.model.memory_kind import MemoryModule, ModelKind, TableShape
from kmem.model.shape import Shape
from kmem.parallel.joining import join_mesh, leave_mesh
from kmem.parallel.kind_table import KindTable
from kmem.parallel.memory_kind import BegunStep, MemoryKind, MemoryPlan, StageMemory, StageParts
from kmem.parallel.memory_kinds import register
from kmem.parallel.mesh import Mesh
from kmem.parallel.pipeline import Pipeline, split_samples
from kmem.parallel.step_context import StepContext
from kmem.parallel.table_bytes import TableBytes
from kmem.tables.table import Table
from kmem.tables.working_set import StepPlan
from kmem.train.dry_run import rank_bytes

NAME = "token_vectors"


# The configuration


class TokenVectorsConfig(Section):
    """The memory."""

    layers: tuple[int, ...]
    """Layers that have it."""


class VectorModelConfig(ModelConfig):
    """A model that may have it."""

    token_vectors: TokenVectorsConfig | None = None
    """A vector per token id; null makes a model without."""


class VectorConfig(Config):
    """A run with such a model."""

    model: VectorModelConfig
    """Shape of the model."""
    token_vectors: TableConfig = TableConfig()
    """Tables of the vectors."""


# The model half


class TokenVectors(MemoryModule):
    """Adds what was read, [B, T, H], to the residual stream. Has no parameters: the vectors are rows."""

    def enter(self, hidden: Tensor, read: Tensor) -> Tensor:
        read = read.to(hidden.dtype)
        return hidden + (read if hidden.dim() == 3 else read.unsqueeze(2))  # the same in every branch


def table_name(layer: int) -> str:
    return f"layers.{layer}.{NAME}.table"


class TokenVectorKind(ModelKind):
    """A table per layer with a row per token id."""

    name = NAME
    title = "a vector per token"
    controls = ("on", "off")

    def layers(self, shape: Shape) -> tuple[int, ...]:
        section = shape.get(NAME)
        return () if section is None else tuple(sorted(section.layers))

    def module(self, shape: Shape, layer: int) -> TokenVectors:
        return TokenVectors()

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        return {
            table_name(layer): TableShape(layer, shape.vocab_size, shape.hidden_size) for layer in self.layers(shape)
        }

    def init_std(self, shape: Shape) -> float:
        return 0.0

    def row_values(self, shape: Shape, layer: int) -> int:
        return shape.hidden_size


# The training half


class StageVectors(StageMemory):
    """The vectors of a stage."""

    kind = NAME

    def __init__(self, kind: MemoryKind, parts: StageParts) -> None:
        self.layers = sorted(parts.modules.get(NAME, {}))
        self.tables = [KindTable(kind, parts.config, table_name(layer)) for layer in self.layers]

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        plan = StepPlan.of([batch.input_ids for batch in micro_batches])  # the row of a token is its id
        return MemoryPlan({table_name(layer): plan for layer in self.layers})

    def read(self, layer: int, context: StepContext) -> Tensor:
        return context.working_sets[table_name(layer)].lookup(context.running)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        return {}  # figures by layer would go here, into metrics.jsonl


class TokenVectorTraining(MemoryKind):
    """Vectors in training."""

    model = TokenVectorKind()

    def stage(self, parts: StageParts, prepared: None) -> StageVectors:
        return StageVectors(self, parts)

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        tokens = config.train.global_batch_size // mesh.data * config.data.sequence_length
        return [
            TableBytes.of(
                NAME, "layer", table.layer, self.settings(config), self.optimizer(config), mesh, table.rows,
                table.width, tokens, tokens,
            )
            for table in self.model.tables(config.model.shape).values()
            if table.layer in layers
        ]  # fmt: skip

    def imagined_read(self, config: Config, layer: int) -> Tensor:
        """What `read` gives, without values, from which a dry run learns what the layer keeps."""
        size = (config.train.micro_batch_size, config.data.sequence_length, config.model.hidden_size)
        return torch.empty(size, requires_grad=True)


register(TokenVectorTraining())


# Two steps


def rows_of(tables: Mapping[str, Table]) -> dict[str, Tensor]:
    return {name: table.read_rows(0, table.spec.rows) for name, table in tables.items()}


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tree = small_run(folder, small_corpus(folder), steps=2)
    tree["model"][NAME] = {"layers": [0, 1]}
    config = VectorConfig.model_validate(tree)
    mesh = join_mesh(config)
    (planned,) = rank_bytes(config, mesh)
    print(f"{planned.total / 1e6:.1f} MB on a device, {planned.activations / 1e6:.1f} MB of them activations")
    data = open_data(config.data, config.model.vocab_size)
    pipeline = Pipeline(config, mesh)
    before, read = rows_of(pipeline.stage_tables.tables), torch.zeros(config.model.vocab_size, dtype=torch.bool)
    batch, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    for step in range(config.train.steps):
        batches = [data.training.read(samples) for samples in split_samples(step * batch, batch, micro_batch, mesh)]
        for sequences in batches:
            read[sequences.input_ids.flatten()] = True
        result = pipeline.train_step(batches, config.train.optimizer.lr)
        print(f"step {step + 1}: loss {result.loss:.4f}")
    for name, rows in rows_of(pipeline.stage_tables.tables).items():
        moved = (rows != before[name]).any(dim=1)
        assert moved.any()
        assert not (moved & ~read).any(), "a row moved that no step read"
        print(f"{name}: {int(moved.sum())} rows of {len(rows)} moved; the steps read {int(read.sum())}")
    pipeline.close()
    leave_mesh()


if __name__ == "__main__":
    main()
