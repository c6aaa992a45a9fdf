"""The bank in training: one table per level. A row holds the blocks of one cluster for all layers of a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kmem.checkpoint.bank.hits import hit_figures
from kmem.checkpoint.bank.rows import check_held, held_rows
from kmem.checkpoint.commit import Commit
from kmem.checkpoint.manifest import check_tree
from kmem.checkpoint.pieces import Pieces
from kmem.config import Config, RowOptimizerConfig, TableConfig, UserError, parse_config
from kmem.data.batch import SequenceBatch
from kmem.model.bank_blocks import BankInput, TokenGroups
from kmem.model.bank_export import TREE_FOLDER
from kmem.model.bank_kind import BankKind
from kmem.model.bank_layout import GENERIC, MISSING, BankLayout, bank_table_name, layer_bank_name
from kmem.model.bank_router import tree_with_embedder
from kmem.model.bank_tree import parse_path, read_tree_record
from kmem.parallel.bank_step import plan_blocks
from kmem.parallel.bank_usage import BankUsage, written_columns
from kmem.parallel.memory_kind import BegunStep, MemoryKind, MemoryPlan, StageMemory, StageParts, StageTable
from kmem.parallel.mesh import Mesh, local_device
from kmem.parallel.stage_tables import mapped_folder
from kmem.parallel.stages import stages_with
from kmem.parallel.table_bytes import TableBytes
from kmem.parallel.table_figures import TIMES, table_figures
from kmem.tables import counter_random
from kmem.tables.exchange import join_groups
from kmem.tables.sharding import RowSelection
from kmem.tables.table import Table
from kmem.tables.table_spec import TableSpec
from kmem.tables.working_set import StepPlan

if TYPE_CHECKING:
    from kmem.parallel.step_context import StepContext


class BankTraining(MemoryKind):
    """Blocks are fetched ahead of the step that reads them, by the addresses of its sequences."""

    model = BankKind()
    draws_added_rows = True

    @property
    def training_controls(self) -> tuple[str, ...]:
        """All controls but "blocked": blocked contexts are embedded anew, which needs the tree's embedder."""
        return tuple(control for control in self.model.controls if control != "blocked")

    def prepare(self, config: Config, tokenizer: Path) -> dict[str, Any]:
        """The tree.json of the tree whose leaves address the bank. The tree must be complete: training needs only its
        leaves, but the run keeps a copy that later looks up contexts."""
        folder = tree_folder(config)
        try:
            BankLayout.of(config.model.shape).check_tree(read_tree_record(folder), folder)
            return dict(tree_with_embedder(folder).record)
        except ValueError as error:
            raise UserError(f"data.addresses.tree: {error}") from None

    def manifest(self, prepared: dict[str, Any] | None) -> dict[str, Any] | None:
        return prepared

    def copied_folders(self, config: Config, run: Path) -> dict[str, Path]:
        tree, copy = tree_folder(config), run / TREE_FOLDER
        if copy.resolve() == tree.resolve():
            return {}
        try:
            whole = tree_with_embedder(copy).fingerprint == read_tree_record(tree)["fingerprint"]
        except ValueError:
            whole = False
        return {} if whole else {TREE_FOLDER: tree}

    def training_batch(self, config: Config, batch: SequenceBatch, samples: Sequence[int], step: int) -> SequenceBatch:
        """The batch with the addresses of some sequences replaced by GENERIC, as `model.bank.generic` says. The draw
        depends only on `data.seed` and the global number of the sequence or of the step: it is equal on every mesh."""
        bank = config.model.bank
        assert bank is not None
        if not bank.generic.probability:
            return batch
        stream = counter_random.key(config.data.seed, "generic blocks", bank.generic.per)
        counters = samples if bank.generic.per == "sequence" else [step] * len(samples)
        bits = [int(counter_random.random_bits(stream, np.uint64(counter))) for counter in counters]
        drawn = torch.tensor([number / 2**64 < bank.generic.probability for number in bits])
        assert batch.addresses is not None
        return replace(batch, addresses=batch.addresses.masked_fill(drawn[:, None], GENERIC))

    def optimizer(self, config: Config) -> RowOptimizerConfig:
        """Blocks are trained beside a frozen anchor, too."""
        return config.bank.optimizer

    def stage(self, parts: StageParts, prepared: Any) -> "StageBank":
        return StageBank(parts)

    def origin(self, config: Config, stored: Commit | None, folder: Path | None, weights_only: bool) -> dict[str, Any]:
        """`seed`: seed of the initial blocks. `start`: the checkpoint whose blocks, without their optimizer state, the
        run began with; missing if the bank was new."""
        if stored is None or stored.config["model"].get(self.name) is None:
            return {"seed": config.train.init_seed}
        known = stored.progress.memories.get(self.name, {})
        seed = known.get("seed")
        start = str(folder.resolve()) if weights_only and folder is not None else known.get("start")
        seed = int(stored.config["train"]["init_seed"]) if seed is None else seed
        return {"seed": seed} | ({} if start is None else {"start": start})

    def check_manifest(self, folder: Path, stored: dict[str, Any], prepared: dict[str, Any] | None, hint: str) -> None:
        check_tree(folder, stored, prepared, hint)

    def check_stored(self, folder: Path, commit: Commit, config: Config, own_run: bool) -> None:
        check_held(folder, parse_config(commit.config), config, own_run)

    def compared(self, section: dict[str, Any]) -> dict[str, Any]:
        """Whether there are generic blocks changes the rows; how often they are trained does not."""
        generic = {**section["generic"], "probability": "above 0" if section["generic"]["probability"] > 0 else 0}
        return {**section, "generic": generic}

    def partial_tensors(self, config: Config) -> set[str]:
        if config.bank.hold == "all":
            return set()
        layout = BankLayout.of(config.model.shape)
        return {*self.model.tables(config.model.shape), *map(bank_table_name, layout.levels)}

    def imagined_read(self, config: Config, layer: int) -> BankInput:
        """Every sequence has one leaf, as with leaf batching."""
        layout, sequences = BankLayout.of(config.model.shape), config.train.micro_batch_size
        counts = {level: torch.empty(sequences, dtype=torch.int64) for level in layout.levels}
        blocks = {level: torch.empty(sequences, layout.block_values(level)).requires_grad_() for level in layout.levels}
        return BankInput(layout, (TokenGroups(None, counts),), blocks)

    def table_bytes(self, config: Config, mesh: Mesh, layers: Sequence[int]) -> list[TableBytes]:
        layout, addresses = BankLayout.of(config.model.shape).of_layers(layers), config.data.addresses
        if not layout.layers:
            return []
        sequences, by_leaf = config.train.global_batch_size // mesh.data, addresses and addresses.batching == "leaf"
        look_ups = sequences * (1 if by_leaf else config.data.sequence_length)
        return [
            TableBytes.of(
                self.name, "level", level, config.bank, self.optimizer(config), mesh,
                sum(map(len, held_rows(config, layout, level))), layout.row_values(level),
                min(look_ups, _fetched_rows(config, layout, level)), 0,
            )
            for level in layout.levels
        ]  # fmt: skip


class StageBank(StageMemory):
    """The bank on a stage: its layers that have blocks. Figures of a step take two small all-reduces; sampled steps add
    two more, of one number per leaf and of two numbers per row."""

    kind = BankKind.name

    tables: list["BankTable"]

    def __init__(self, parts: StageParts) -> None:
        config, mesh, self.mesh = parts.config, parts.mesh, parts.mesh
        self.layers = sorted(parts.modules.get(self.kind, {}))
        self.whole = BankLayout.of(parts.shape)
        self.layout = self.whole.of_layers(self.layers)
        group = None
        stages = stages_with(config, mesh, self.whole.layers)
        if config.bank.optimizer.clip_norm is not None and len(stages) > 1:
            ranks = [stage * mesh.data + rank for stage in stages for rank in range(mesh.data)]
            group = join_groups([ranks], config.parallel.timeout_seconds)
        levels = self.layout.levels if self.layers else ()
        self.tables = [BankTable(config, self.layout, level, group) for level in levels]

    def start(self, tables: Mapping[str, Table]) -> None:
        self._by_level = {table.level: tables[stage_table_name(self.layout, table.level)] for table in self.tables}
        # All stages use the same clusters, so only one stage counts them.
        self._counts = bool(self.layers) and self.layers[0] == self.whole.layers[0]
        counted = self._by_level if self._counts else {}
        self._usage = BankUsage(self.whole, counted, self._counts and self.mesh.data_rank == 0)

    def plan(self, micro_batches: Sequence[SequenceBatch], control: str | None = None) -> MemoryPlan:
        if control is not None:
            address = {"generic": GENERIC, "none": MISSING}[control]
            micro_batches = [_addressed(batch, address) for batch in micro_batches]
        rows, groups = plan_blocks(self.layout, micro_batches)
        plans = {}
        for table in self.tables:
            plan = rows[table.level]
            places = table.selection.places(torch.from_numpy(plan.rows)).numpy()
            plans[stage_table_name(self.layout, table.level)] = StepPlan(places, plan.index)
        return MemoryPlan(plans, groups)

    def read(self, layer: int, context: "StepContext") -> BankInput:
        layout, groups = self.layout, context.beside(self.kind).groups
        blocks = {}
        for level in {level for group in groups for level in group.counts}:
            width = layout.block_values(level)
            start = layout.layers.index(layer) * width
            working_set = context.working_sets[stage_table_name(layout, level)]
            blocks[level] = working_set.columns(context.running, start, start + width)
        return BankInput(layout, groups, blocks)

    def close_step(self, step: BegunStep, sampled: bool) -> dict[str, dict[str, Any]]:
        """Level -> figures of a step over all ranks. A block is a row of a cluster. `touch_density`, `bytes`,
        `stall_ms`, `fetch_ms` and `owner_ms` as in `table_figures`, and

            fetched_blocks    distinct clusters whose blocks ranks asked for, summed over the data-parallel ranks
            conflict_blocks   fetched clusters that had to wait for the update of an earlier step
            touched_blocks    distinct clusters of the level, generic blocks included, that the global batch used
            new_blocks        touched blocks that no step of the run had touched before
            age_mean          mean age of the other touched blocks: steps since the last step that touched, and so
                              trained, them; 1 if that was the step before
            age_max           largest age
            hits              in sampled steps: how the tokens since the run began are spread over the level's clusters
                              (`kmem.checkpoint.bank.hits.hit_figures`)
            write_norms       in sampled steps: mean and max, over the touched blocks, of the 2-norm of the parts that
                              write (`down`, `b`, `values`) in all layers, after the step

        Collective over the world; all ranks pass the same `sampled`.
        """
        levels = self.whole.levels
        tables = [self._by_level.get(level) for level in levels]
        sums, oldest = (torch.zeros(len(levels), width, dtype=torch.float64) for width in (2, 1))
        self._usage.count(step.micro_batches)
        for place, (level, table) in enumerate(zip(levels, tables, strict=True)):
            if table is not None and self._counts:
                ages = self._usage.ages(level, step.tickets[table.spec.name].owned_rows)
                sums[place] = torch.tensor([int((ages == 0).sum()), int(ages.sum())])
                oldest[place] = int(ages.max()) if len(ages) else 0
        rows = [self.whole.rows(level) for level in levels]
        counted, sums, oldest = table_figures(tables, step, rows, sums, oldest, self._counts)
        hits = self._usage.whole_hits() if sampled else None
        norms = self._write_norms(step) if sampled else {}
        figures = {}
        for level, known, (new, total), (age,) in zip(levels, counted, sums.tolist(), oldest.tolist(), strict=True):
            figures[str(level)] = {
                "fetched_blocks": known["unique_rows"],
                "conflict_blocks": known["conflict_rows"],
                "touched_blocks": known["touched_rows"],
                **{name: known[name] for name in ("touch_density", "bytes", *TIMES, "owner_ms")},
                "new_blocks": int(new),
                "age_mean": total / max(1, known["touched_rows"] - new),
                "age_max": int(age),
                "hits": None if hits is None else hit_figures(self.whole, hits, level),
                "write_norms": norms.get(level),
            }
        return figures

    def _write_norms(self, step: BegunStep) -> dict[int, dict[str, float]]:
        """Level -> write norms of the blocks that the step touched. All blocks would cost a read of the whole bank."""
        levels = self.whole.levels
        squares = {level: torch.zeros(2, self.whole.rows(level), dtype=torch.float64) for level in levels}
        for level, table in self._by_level.items():
            mine = step.tickets[table.spec.name].owned_rows
            rows = mine + table.local.start
            squares[level][0, rows] = table.squares(mine, written_columns(self.layout, level))
            squares[level][1, rows] = float(self._counts)
        whole = torch.cat([squares[level] for level in levels], dim=1).to(local_device())
        dist.all_reduce(whole)
        figures = {}
        parts = whole.cpu().split([self.whole.rows(level) for level in levels], dim=1)
        for level, part in zip(levels, parts, strict=True):
            norms = part[0, part[1] > 0].sqrt()
            if len(norms):
                figures[level] = {"mean": float(norms.mean()), "max": float(norms.max())}
        return figures

    def state(self, saving: bool) -> dict[str, Pieces]:
        return self._usage.state(saving)


class BankTable(StageTable):
    """The table of a level.

    Args:
        layout: layout of this stage's layers; at least one layer has blocks.
        norm_group: the ranks of all stages that have blocks, over which the norm of a level's gradient is summed; None
            if these are only the ranks of this stage.
    """

    section = BankKind.name

    def __init__(
        self, config: Config, layout: BankLayout, level: int, norm_group: dist.ProcessGroup | None = None
    ) -> None:
        self.settings: TableConfig = config.bank
        self.optimizer: RowOptimizerConfig | None = config.bank.optimizer
        self.layout, self.level, self.norm_group = layout, level, norm_group
        self.selection = RowSelection(layout.rows(level), tuple(held_rows(config, layout, level)))

    def spec(self, config: Config) -> TableSpec:
        bank, layout, seed, selection = self.settings, self.layout, config.train.init_seed, self.selection

        def initial_rows(start: int, stop: int) -> Tensor:
            held = [rows for _, rows in selection.cut(start, stop)]
            return torch.cat([layout.initial_rows(seed, self.level, rows.start, rows.stop) for rows in held])

        return TableSpec(
            stage_table_name(layout, self.level),
            len(selection),
            layout.row_values(self.level),
            bank.dtype,
            bank.store,
            mapped_folder(config, bank, self.section) if bank.store == "mmap" else None,
            seed,
            initial_rows=initial_rows,
            selection=selection,
        )

    def pieces(self, table: Table) -> dict[str, dict[str, Pieces]]:
        """By layer: columns of the rows and of their moments. All layers share an array with one number per row; each
        layer gets it whole."""
        width, arrays = self.layout.block_values(self.level), table.arrays()
        by_layer = {}
        for place, layer in enumerate(self.layout.layers):
            columns = {name: slice(place * width, (place + 1) * width) for name, wide in arrays.items() if wide > 1}
            by_layer[layer_bank_name(layer, self.level)] = table.pieces(columns)
        return by_layer


def stage_table_name(layout: BankLayout, level: int) -> str:
    """Name of a stage's table of a level; every stage has another name.

    Args:
        layout: layout of this stage's layers.
    """
    return f"{bank_table_name(level)}.layers-{layout.layers[0]}-{layout.layers[-1]}"


def tree_folder(config: Config) -> Path:
    """Folder of the tree whose leaves address the bank of a run that has a bank."""
    assert config.data.addresses is not None
    return Path(config.data.addresses.tree).expanduser()


def _addressed(batch: SequenceBatch, address: int) -> SequenceBatch:
    """The batch with one address everywhere."""
    assert batch.addresses is not None
    return replace(batch, addresses=torch.full_like(batch.addresses, address))


def _fetched_rows(config: Config, layout: BankLayout, level: int) -> int:
    """Number of rows of a level that text can fetch: all rows, or the generic row and the rows of the chosen subtrees
    and of the clusters above them."""
    addresses = config.data.addresses
    if addresses is None or addresses.subtrees is None:
        return layout.rows(level)
    paths = [parse_path(path) for path in addresses.subtrees]
    return sum(map(len, layout.subtree_rows(level, paths)))


KIND = BankTraining()
