"""`kmem train --dry-run`: the size and memory of a configured run, without tokens or tables. Data is only needed where
the size of the vocabulary is taken from it."""

import json
import sys
from dataclasses import asdict, dataclass
from math import prod

from kmem.config import Config
from kmem.data.reader import resolve_vocab_size
from kmem.model.parameter_counts import ParameterCounts, count_parameters, tensor_shapes
from kmem.parallel.launch_environment import environment_rank
from kmem.parallel.layer_work import layer_work, loss_work
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.mesh import Mesh
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS
from kmem.parallel.stages import stage_bounds
from kmem.parallel.table_bytes import TableBytes
from kmem.wording import counted, magnitude, print_table

UNITS = """A rank is one process with one device; all ranks of a stage hold as much. 1 KiB = 1,024 bytes.
Active: the parameters that one token uses. Weights, gradients and optimizer state are exact; activations are counted
for a GPU, as if every expert got equally many tokens. Kernels, communication and the framework itself come on top.
--print-config shows every field of the run."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank of a stage, without the memory of kernels, fragmentation and the framework itself."""

    stage: int
    parameters: int
    """Parameters of this rank, without tables."""
    weights: int
    gradients: int
    optimizer: int
    """Masters and moments."""
    activations: int
    """Of the micro-batches in flight on this stage, and of one layer while it is computed; counted for a GPU."""
    tables: tuple[TableBytes, ...] = ()
    """Tables of the stage."""

    @property
    def working_set(self) -> int:
        return sum(table.working_set for table in self.tables)

    @property
    def total(self) -> int:
        """Bytes on the compute device."""
        tables = sum(table.bytes for table in self.tables if table.store == "device")
        return self.weights + self.gradients + self.optimizer + self.activations + self.working_set + tables


def print_dry_run(config: Config, ranks: int | None, *, as_json: bool) -> int:
    """Print parameter counts and memory per rank, or one JSON object that has the configuration too; returns the exit
    code."""
    given, config = config, resolve_vocab_size(config)
    world = ranks or max(environment_rank()[1], config.parallel.pipeline * config.parallel.expert)
    mesh = Mesh(0, config.parallel.pipeline, config.data_parallel_size(world), config.parallel.expert)
    counts = count_parameters(config.model.shape)
    held = rank_bytes(config, mesh)
    if as_json:
        json.dump(to_json(config, mesh, counts, held), sys.stdout)
        print()
        return 0
    if given.model.vocab_size is None:
        source = config.data.sources[0].path
        print(f"model.vocab_size: {config.model.vocab_size}, the size of the tokenizer of {source}")
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
        "components": counts.components | _fetched_components(counts),
        "mesh": {"pipeline": mesh.pipeline, "data": mesh.data, "expert": mesh.expert, "world": mesh.world},
        "rank_bytes": [_stage_json(stage) for stage in ranks],
        "config": config.model_dump(mode="json"),
    }


def _fetched_components(counts: ParameterCounts) -> dict[str, int]:
    """For a model whose contexts fetch rows: the model without tables, and the elements that a context fetches."""
    return {"anchor": counts.anchor, "fetched": counts.fetched} if counts.fetched else {}


def _stage_json(stage: RankBytes) -> dict:
    tables = [{**asdict(table), "bytes": table.bytes} for table in stage.tables]
    return {**asdict(stage), "tables": tables, "working_set": stage.working_set, "total": stage.total}


def rank_bytes(config: Config, mesh: Mesh) -> list[RankBytes]:
    """Memory of one rank, for each stage."""
    bounds, train = stage_bounds(config), config.train
    sizes, kinds = _layer_sizes(config), kinds_of(config.model.shape)
    moments = 4 * len(BACKBONE_OPTIMIZERS[train.optimizer.name].moments)  # bytes per parameter
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
            weights, gradients, optimizer = 2 * own, 4 * own, (4 + moments) * sharded
        elif shards > 1:
            weights, gradients, optimizer = 4 * own, 4 * own, (4 + moments) * sharded
        else:
            weights, gradients, optimizer = 4 * own, 4 * own, moments * own
        activations = _activation_bytes(config, mesh, stage, layers)
        tables = [table for kind in kinds for table in kind.table_bytes(config, mesh, [place - 1 for place in layers])]
        stages.append(RankBytes(stage, own, weights, gradients, optimizer, activations, tuple(tables)))
    return stages


def _layer_sizes(config: Config) -> list[list[int]]:
    """[replicated, expert] elements of each pipeline layer."""
    tied = config.model.tie_embeddings
    sizes = [[0, 0] for _ in range(config.model.num_layers + 2 + tied)]
    model = config.model.shape
    tables = {name for kind in kinds_of(model) for name in kind.model.tables(model)}
    for name, shape in tensor_shapes(model).items():
        if name.endswith("selection_bias") or name in tables:
            continue
        first, *rest = name.split(".")
        place = {"embedding": 0, "norm": config.model.num_layers + 1, "head": config.model.num_layers + 1}
        layer = int(rest[0]) + 1 if first == "layers" else place[first]
        sizes[layer][".experts." in name] += prod(shape)
    if tied and config.parallel.pipeline > 1:
        sizes[-1][0] += sizes[0][0]  # the last stage holds a copy of the embedding
    return sizes


def _activation_bytes(config: Config, mesh: Mesh, stage: int, layers: range) -> int:
    """Bytes on a GPU: what the micro-batches in flight keep, and the most that one layer holds beside it."""
    train, last = config.train, config.model.num_layers + 1
    micro_batches = train.global_batch_size // (train.micro_batch_size * mesh.data)
    works = [layer_work(config, place - 1, mesh.expert) for place in layers if 0 < place < last]
    works += [loss_work(config)] if last in layers else []
    in_flight = min(micro_batches, mesh.pipeline - stage)
    return in_flight * sum(work.kept for work in works) + max((work.extra for work in works), default=0)


def _print_tables(config: Config, mesh: Mesh, counts: ParameterCounts, ranks: list[RankBytes]) -> None:
    components = {name: count for name, count in counts.components.items() if count}
    rows = {
        "total": counts.total,
        "total without embeddings": counts.non_embedding,
        "active per token": counts.active,
        "active without embeddings": counts.active_non_embedding,
    }
    if counts.tables not in (0, *components.values()):  # the sum of several components
        rows["tables"] = counts.tables
    shown: list[list[str]] = []
    for section in (rows, components, _fetched_components(counts)):
        shown += [*([name, f"{count:,}"] for name, count in section.items()), []]
    print_table(f"{config.name}: {magnitude(counts.total)} parameters", ("parameters", "count"), shown, 120)
    total = "total with rows in use" if any(stage.tables for stage in ranks) else "total"
    columns = ["stage", "parameters", "weights", "gradients", "optimizer", "activations", total]
    shown = []
    for stage in ranks:
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
        shown.append([str(stage.stage), f"{stage.parameters:,}", *map(_bytes, parts)])
    print_table(f"memory per rank at {mesh} = {counted(mesh.world, 'rank')}", columns, shown, 120)
    for kind in kinds_of(config.model.shape):
        settings = kind.settings(config)
        where = {"device": "device memory", "host": "host memory", "mmap": "a mapped file"}[settings.store]
        columns = ["stage", "table", "rows", "bytes of a row + state", f"in {where}"]
        columns += ["in use (at most)", "host buffers (at most)"]
        shown = [
            [
                str(stage.stage),
                f"{table.place} {table.number}",
                f"{table.rows:,}",
                f"{table.row_bytes:,} + {table.state_bytes + table.busy_bytes:,}",
                *map(_bytes, (table.bytes, table.working_set, table.host_buffers)),
            ]
            for stage in ranks
            for table in stage.tables
            if table.kind == kind.name
        ]
        title = f"{kind.name} tables per rank: {settings.dtype} rows, {settings.optimizer.name}"
        print_table(title, columns, shown, 120)
    print(UNITS)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}"
