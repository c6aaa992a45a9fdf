"""`kmem train --dry-run`: what a configuration means, without data, tokenizer or memory."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kmem.checkpoint.bank.rows import held_rows
from kmem.config import Config, TableConfig, dump_config
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.model.bank_tree import parse_path
from kmem.model.engram_reader import table_name, table_rows
from kmem.model.shape import Shape
from kmem.parallel.mesh import Mesh, environment_rank
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS
from kmem.parallel.parameter_counts import ParameterCounts, count_parameters, tensor_shapes
from kmem.parallel.stages import stage_bounds
from kmem.tables.row_optimizers import make_row_optimizer
from kmem.tables.sharding import row_range
from kmem.tables.stores import ArrayLayout, RecordLayout, StoreKind
from kmem.tables.table_spec import DTYPES
from kmem.wording import counted, magnitude

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TableBytes:
    """A table of a stage, on the rank that owns most of its rows: that of a layer's n-gram memory, or of a level of the
    memory bank in all of the stage's layers."""

    layer: int
    """Of a memory bank the first of the stage's layers."""
    level: int | None
    """None: of n-gram memory."""
    rows: int
    """Of this rank."""
    row_bytes: int
    state_bytes: int
    """Optimizer state of a row."""
    busy_bytes: int
    """Count of the steps that hold a row, and what pads its record in a mapped file; beside a device store the count is
    in host memory."""
    store: StoreKind
    working_set: int
    """At most, for the running step, on the compute device: unique rows and their gradient in fp32, and an index of
    all look-ups. Text repeats itself, so a step has fewer unique rows than look-ups, the bound taken here; those of a
    bank are sequences of single leaves, or else tokens."""
    prefetched: int
    """At most, in host memory: rows and indices of the steps that are fetched ahead."""

    @property
    def bytes(self) -> int:
        """Rows with state and counts. Every array starts at a page, so up to a page for each comes on top."""
        return self.rows * (self.row_bytes + self.state_bytes + self.busy_bytes)


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank of a stage. Memory of kernels, fragmentation and the framework itself come on top."""

    stage: int
    parameters: int
    """Elements of this rank, without tables."""
    weights: int
    gradients: int
    optimizer: int
    """Masters and moments."""
    activations: int
    """Estimate for the micro-batches in flight on this stage."""
    tables: tuple[TableBytes, ...] = ()
    """Of the stage."""

    @property
    def working_set(self) -> int:
        return sum(table.working_set for table in self.tables)

    @property
    def total(self) -> int:
        """On the compute device."""
        tables = sum(table.bytes for table in self.tables if table.store == "device")
        return self.weights + self.gradients + self.optimizer + self.activations + self.working_set + tables


def print_dry_run(config: Config, ranks: int | None, *, as_json: bool) -> int:
    """Print the resolved configuration, parameter counts and memory per rank; returns the exit code."""
    world = ranks or max(environment_rank()[1], config.parallel.pipeline * config.parallel.expert)
    mesh = Mesh(0, config.parallel.pipeline, config.data_parallel_size(world), config.parallel.expert)
    counts = count_parameters(config.model)
    held = rank_bytes(config, mesh)
    if as_json:
        json.dump(to_json(config, mesh, counts, held), sys.stdout)
        print()
        return 0
    _print_tables(config, mesh, counts, held)
    return 0


def to_json(config: Config, mesh: Mesh, counts: ParameterCounts, ranks: list[RankBytes]) -> dict:
    """The dry run as one object with exact integers."""
    return {
        "name": config.name,
        "total": counts.total,
        "active": counts.active,
        "tables": counts.tables,
        "non_embedding": counts.non_embedding,
        "active_non_embedding": counts.active_non_embedding,
        "components": counts.components | _bank_components(counts),
        "mesh": {"pipeline": mesh.pipeline, "data": mesh.data, "expert": mesh.expert, "world": mesh.world},
        "rank_bytes": [_stage_json(stage) for stage in ranks],
        "config": config.model_dump(mode="json"),
    }


def _bank_components(counts: ParameterCounts) -> dict[str, int]:
    """Of a model with a memory bank: what it is without tables, and the part of its bank that a context fetches."""
    return {"anchor": counts.anchor, "fetched": counts.fetched} if counts.bank else {}


def _stage_json(stage: RankBytes) -> dict:
    tables = [{**asdict(table), "bytes": table.bytes} for table in stage.tables]
    return {**asdict(stage), "tables": tables, "working_set": stage.working_set, "total": stage.total}


def rank_bytes(config: Config, mesh: Mesh) -> list[RankBytes]:
    """Memory of a rank of each stage."""
    bounds, train = stage_bounds(config), config.train
    sizes, tables = _layer_sizes(config), _ngram_tables(config, mesh)
    moments = 4 * len(BACKBONE_OPTIMIZERS[train.optimizer.name].moments)  # bytes of a parameter
    stages = []
    for stage in range(mesh.pipeline):
        layers = range(bounds[stage], bounds[stage + 1])
        dense = sum(sizes[layer][0] for layer in layers)
        experts = sum(sizes[layer][1] for layer in layers) // mesh.expert
        own = dense + experts
        shards = mesh.data if config.parallel.zero_stage == 1 else 1
        expert_shards = mesh.data // mesh.expert if config.parallel.zero_stage == 1 else 1
        sharded = -(-dense // shards) + -(-experts // expert_shards)
        if config.model.frozen_anchor and train.precision == "fp32":
            weights, gradients, optimizer = 4 * own, 0, 0
        elif train.precision == "bf16":
            weights, gradients, optimizer = 2 * own, (2 + 4) * own, (4 + moments) * sharded
        elif shards > 1:
            weights, gradients, optimizer = 4 * own, 4 * own, (4 + moments) * sharded
        else:
            weights, gradients, optimizer = 4 * own, 4 * own, moments * own
        micro_batches = train.global_batch_size // (train.micro_batch_size * mesh.data)
        in_flight = min(micro_batches, mesh.pipeline - stage)
        activations = in_flight * sum(_activation_bytes(config, layer) for layer in layers)
        own_tables = [table for table in tables if table.layer + 1 in layers]
        own_tables += _bank_tables(config, mesh, [layer - 1 for layer in layers])
        stages.append(RankBytes(stage, own, weights, gradients, optimizer, activations, tuple(own_tables)))
    return stages


def _ngram_tables(config: Config, mesh: Mesh) -> list[TableBytes]:
    """All tables of n-gram memories; the rows of each are divided over the data-parallel ranks of its layer's stage."""
    engram = config.model.engram
    if engram is None:
        return []
    assert engram.orders is not None
    assert engram.heads is not None
    assert engram.row_dim is not None
    tokens = config.train.global_batch_size // mesh.data * config.data.sequence_length
    look_ups = tokens * len(engram.orders) * engram.heads
    return [
        _table(config, config.engram, mesh, rows, engram.row_dim, look_ups, look_ups, layer)
        for layer, rows in table_rows(Shape(config.model.model_dump())).items()
    ]


def _bank_tables(config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
    """The tables of a memory bank on the stage of these layers, by level."""
    shape, addresses = Shape(config.model.model_dump()), config.data.addresses
    layout = None if shape.bank is None else BankLayout.of(shape).of_layers(layers)
    if layout is None or not layout.layers:
        return []
    sequences, first = config.train.global_batch_size // mesh.data, layout.layers[0]
    by_leaf = addresses is not None and addresses.batching == "leaf"
    look_ups = sequences * (1 if by_leaf else config.data.sequence_length)
    return [
        _table(
            config, config.bank, mesh, sum(map(len, held_rows(config, layout, level))), layout.row_values(level),
            min(look_ups, _fetched_rows(config, layout, level)), 0, first, level,
        )
        for level in layout.levels
    ]  # fmt: skip


def _fetched_rows(config: Config, layout: BankLayout, level: int) -> int:
    """Rows of a level that text can fetch: all, or those above and below the chosen subtrees, and the generic ones."""
    addresses = config.data.addresses
    if addresses is None or addresses.subtrees is None:
        return layout.rows(level)
    paths = [parse_path(path) for path in addresses.subtrees]
    return sum(map(len, layout.subtree_rows(level, paths)))


def _table(
    config: Config,
    settings: TableConfig,
    mesh: Mesh,
    rows: int,
    dim: int,
    look_ups: int,
    indexed: int,
    layer: int,
    level: int | None = None,
) -> TableBytes:
    """A table of `rows` rows of `dim` values of which a rank's step looks up so many, with an index of `indexed`."""
    state: dict[str, ArrayLayout] = {}
    if level is not None or not config.model.frozen_anchor:
        state = make_row_optimizer(settings.optimizer, dim, config.train.init_seed, table_name(layer)).state()
    state_bytes = sum(array.row_bytes for array in state.values())
    row, busy = ArrayLayout(dim, DTYPES[settings.dtype]), ArrayLayout(1, torch.uint8)
    row_bytes, busy_bytes, unique = row.row_bytes, busy.row_bytes, min(look_ups, rows)
    if settings.store == "mmap":
        busy_bytes = RecordLayout.of({"rows": row, **state, "busy": busy}).stride - row_bytes - state_bytes
    index = indexed * torch.int64.itemsize
    return TableBytes(
        layer=layer,
        level=level,
        rows=len(row_range(rows, mesh.data, 0)),
        row_bytes=row_bytes,
        state_bytes=state_bytes,
        busy_bytes=busy_bytes,
        store=settings.store,
        working_set=2 * unique * dim * torch.float32.itemsize + index,
        prefetched=settings.prefetch_depth * (unique * row_bytes + index),
    )


def _layer_sizes(config: Config) -> list[tuple[int, int]]:
    """(replicated, expert) elements of each pipeline layer."""
    tied = config.model.tie_embeddings
    sizes = [[0, 0] for _ in range(config.model.num_layers + 2 + tied)]
    tables = {table_name(layer) for layer in table_rows(Shape(config.model.model_dump()))}
    if config.model.bank is not None:
        layout = BankLayout.of(Shape(config.model.model_dump()))
        tables |= {layer_bank_name(layer, level) for layer in layout.layers for level in layout.levels}
    for name, shape in tensor_shapes(config.model).items():
        elements = 1
        for length in shape:
            elements *= length
        if name.endswith("selection_bias") or name in tables:
            continue
        first, *rest = name.split(".")
        place = {"embedding": 0, "norm": config.model.num_layers + 1, "head": config.model.num_layers + 1}
        layer = int(rest[0]) + 1 if first == "layers" else place[first]
        sizes[layer][".experts." in name] += elements
    if tied and config.parallel.pipeline > 1:
        sizes[-1][0] += sizes[0][0]  # the last stage holds a copy of the embedding
    return [(dense, experts) for dense, experts in sizes]


def _activation_bytes(config: Config, layer: int) -> int:
    """Kept for the backward pass of one micro-batch by one pipeline layer: a rule of thumb, not a measurement."""
    train, model = config.train, config.model
    tokens, width = train.micro_batch_size * config.data.sequence_length, 2 if train.precision == "bf16" else 4
    branches = 1 if model.hyper_connections is None else model.hyper_connections.branches
    stream = branches * model.hidden_size
    if layer == 0 or layer > model.num_layers or train.activation_checkpointing:
        return tokens * stream * width
    values = 10 * model.hidden_size  # norms, projections, attention output and residuals
    if branches > 1:
        # The streams around both sublayers, and what a sublayer gave; in bf16 also copies in fp32 to mix in.
        values += 2 * (stream + model.hidden_size if width == 4 else 5 * stream + 2 * model.hidden_size)
    if model.engram is not None and layer - 1 in model.engram.layers:
        engram = model.engram
        assert engram.orders is not None
        assert engram.heads is not None
        assert engram.row_dim is not None
        values += 2 * stream + model.hidden_size + len(engram.orders) * engram.heads * engram.row_dim
        values += (5 if width == 4 else 12) * stream if engram.conv_kernel else 0
    if model.moe is not None and layer > model.moe.first_dense_layers:
        chain = model.moe.chain
        passes = 1 if chain is None else chain.iterations
        shared = 1 if chain is None or chain.shared_experts == "once" else passes
        values += passes * model.moe.top_k * (4 * model.moe.intermediate_size + 2 * model.hidden_size)
        values += 4 * shared * model.moe.num_shared_experts * model.moe.intermediate_size
        values += 2 * (passes - 1) * model.hidden_size  # state and norm of the later passes
    else:
        values += 4 * (model.intermediate_size or 0)
    return tokens * values * width


_COMPONENTS = {"engram_table": "n-gram rows"}
"""Component -> what a table calls it, where its own name would be that of a sum."""


def _print_tables(config: Config, mesh: Mesh, counts: ParameterCounts, ranks: list[RankBytes]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(dump_config(config).rstrip())
    parameters = Table("parameters", "count", title=f"{config.name}: {magnitude(counts.total)} parameters")
    components = {name: count for name, count in counts.components.items() if count}
    rows = {
        "total": counts.total,
        "total without embeddings": counts.non_embedding,
        "active per token": counts.active,
        "active without embeddings": counts.active_non_embedding,
    }
    if counts.tables not in (0, *components.values()):  # the sum of several
        rows["tables"] = counts.tables
    for section in (rows, components, _bank_components(counts)):
        for name, count in section.items():
            parameters.add_row(_COMPONENTS.get(name, name) if section is components else name, f"{count:,}")
        parameters.add_section()
    per_rank = Table(
        "stage", "parameters", "weights", "gradients", "optimizer", "activations (estimate)", "total",
        title=f"memory per rank at {mesh} = {counted(mesh.world, 'rank')}",
    )  # fmt: skip
    if any(stage.tables for stage in ranks):
        per_rank.columns[-1].header = "total with rows in use"
    for stage in ranks:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
        per_rank.add_row(str(stage.stage), f"{stage.parameters:,}", *map(_bytes, parts))
    shown = [parameters, per_rank]
    if config.model.engram is not None:
        shown.append(_tables_for_people("layer", config.engram, ranks))
    if config.model.bank is not None:
        shown.append(_tables_for_people("level", config.bank, ranks))
    console = Console(width=max(Console().width, 120))
    for table in shown:
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


def _tables_for_people(number: Literal["layer", "level"], settings: TableConfig, ranks: list[RankBytes]) -> "Table":
    """The tables that have a layer, or those that have a level."""
    from rich.table import Table

    place = {"device": "device memory", "host": "host memory", "mmap": "a mapped file"}[settings.store]
    tables = Table(
        "stage", number, "rows", "bytes of a row + state", f"in {place}", "in use (at most)", "prefetched (at most)",
        title=f"{'n-gram' if number == 'layer' else 'bank'} tables per rank: {settings.dtype} rows, "
        f"{settings.optimizer.name}",
    )  # fmt: skip
    for stage in ranks:
        for table in stage.tables:
            if (table.level is None) != (number == "layer"):
                continue
            tables.add_row(
                str(stage.stage),
                str(getattr(table, number)),
                f"{table.rows:,}",
                f"{table.row_bytes:,} + {table.state_bytes + table.busy_bytes:,}",
                _bytes(table.bytes),
                _bytes(table.working_set),
                _bytes(table.prefetched),
            )
    return tables


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}"
