"""What every kind of memory goes through: training on meshes against plain PyTorch, checkpoints, controls, and folders
of Hugging Face.

A kind gives its sections, and a reference of its own for what layers read from ordinary parameters.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import Config, ModelConfig, Source, UserError, parse_config
from kmem.data.batch import SequenceBatch
from kmem.data.reader import open_data
from kmem.eval.checkpoint import held_out_figures
from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from kmem.model.decoder import Decoder
from kmem.model.init import initialise_
from kmem.model.memory_kind import OFF
from kmem.model.memory_kinds import KINDS
from kmem.model.shape import Shape
from kmem.model.token_rows import TokenRows, TokenRowsKind
from kmem.tables import counter_random
from kmem.train.load_plan import plan_load
from tests.distributed.training_case import (
    build,
    load_checkpoint,
    small_config,
    step_batches,
    synthetic_sequences,
    train_plainly,
)
from tests.hf.loaded import TOLERANCE, check_assisted_decoding, generate_both_ways, opened
from tests.hf.models import VOCABULARY, model, random_weights, write_run
from tests.model.dense_mask import document_mask

EXPERTS = {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense_layers": 1}
SAVE, LAST = 2, 4
HELD_OUT = 1000
"""A step whose batch is never trained."""

Tables = Mapping[str, Tensor]
Read = Callable[[Shape, Tables, Tensor, "Tensor | None", str], dict[int, Any]]
"""(shape, whole tables by name, token ids int64 [B, T], document ids int64 [B, T] or None, control other than off) ->
layer -> what it reads, differentiable in the tables."""


@dataclass(frozen=True)
class MemoryCase:
    """A kind of memory, and its reference."""

    kind: str
    section: Mapping[str, Any]
    """`model.KIND`."""
    read: Read

    def config(self, **changes: Any) -> dict[str, Any]:
        """A configuration of the small model with experts; dotted changes."""
        defaults = {
            "model__moe": EXPERTS,
            f"model__{self.kind}": dict(self.section),
            # A larger eps: Adam makes a full step of a gradient that is 0 but for rounding.
            f"{self.kind}__optimizer": {"betas": [0.9, 0.99], "eps": 1e-5},
            "train__optimizer": {"lr": 0.003, "clip_norm": None},
        }
        return small_config(**{**defaults, **changes})


def read_rows(kind: str, row_ids: Callable[[Shape, Tensor, Tensor | None], Tensor]) -> Read:
    """The reference of a kind whose rows follow from token ids: `row_ids` gives int64 [B, T, K], for every layer."""

    def read(shape: Shape, tables: Tables, ids: Tensor, documents: Tensor | None, control: str) -> dict[int, TokenRows]:
        described = KINDS[kind]
        assert isinstance(described, TokenRowsKind)
        rows, found = row_ids(shape, ids, documents), {}
        for name, table in described.tables(shape).items():
            own = control == described.trained_control(shape)
            chosen = rows if own else described.addresses(shape).other_rows(table.layer, control)(rows)
            values = F.embedding(chosen, tables[name], sparse=tables[name].requires_grad)
            found[table.layer] = TokenRows(values, document_ids=documents)
        return found

    return read


# Training


class Plain:
    """The whole model in one process, with its tables as parameters."""

    def __init__(self, case: MemoryCase, config: Config) -> None:
        self.case, self.config, self.shape = case, config, config.model.shape
        kind, seed = KINDS[case.kind], config.train.init_seed
        self.model = Decoder(self.shape)
        initialise_(self.model, self.shape, seed)
        self.first = {
            name: torch.from_numpy(
                counter_random.normal_rows(
                    0, table.rows, table.width, counter_random.key(seed, name), kind.init_std(self.shape)
                )
            )
            for name, table in kind.tables(self.shape).items()
        }
        """Tables before the first step."""
        self.tables = {name: torch.nn.Parameter(table.clone()) for name, table in self.first.items()}

    def loss(self, batch: SequenceBatch, control: str | None = None) -> Tensor:
        """Mean cross entropy."""
        kind = KINDS[self.case.kind]
        if control == "off":
            read = dict.fromkeys(kind.layers(self.shape), OFF)
        else:
            own = control or kind.trained_control(self.shape)
            read = self.case.read(self.shape, self.tables, batch.input_ids, batch.document_ids, own)
        mask, memories = document_mask(batch.document_ids), {self.case.kind: read}
        logits = self.model.logits(self.model(batch.input_ids, batch.position_ids, mask, memories=memories))
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())

    @functools.cached_property
    def trained(self) -> tuple[list[float], list[float], dict[str, Tensor]]:
        """Trained to step LAST by autograd, AdamW and SparseAdam on the whole batch, written out: losses, norms of the
        weights' gradients, and of each table whether a step touched its rows."""
        rows = getattr(self.config, self.case.kind).optimizer
        return train_plainly(self.config, self.model, self.tables, rows, LAST, self.loss)

    @torch.no_grad()
    def held_out(self, controls: Sequence[str]) -> dict[str, float]:
        """Control -> mean loss of text that was not trained."""
        batch = self.config.train.global_batch_size
        sequences = synthetic_sequences(list(range(HELD_OUT * batch, (HELD_OUT + 1) * batch)))
        return {control: self.loss(sequences, control).item() for control in controls}


def memory_case(
    tree: dict[str, Any], kind: str, root: str | None = None, load: int | None = None, save: int | None = None
) -> dict[str, Any]:
    """Train to step LAST, from the checkpoint of step `load` if it is given, saving after step `save`: losses and norms
    by step, checksums of the state by step, this rank's rows, and held-out losses by control."""
    from kmem.checkpoint.commit import Progress, step_folder
    from kmem.checkpoint.store import CheckpointStore
    from kmem.parallel.memory_kinds import KINDS as TRAINED
    from kmem.parallel.training_state import optimizer_steps
    from kmem.train.saving import save_training
    from tests.distributed.training_case import state_checksums

    pipeline, store = build(tree), CheckpointStore(Path(root or "none"))
    first = 0 if load is None else load_checkpoint(store, step_folder(Path(root or "none"), load), pipeline)
    begun: deque[Any] = deque()
    losses, norms, checksums = {}, {}, {}
    for step in range(first, LAST + 1):
        if step in (load, save, LAST):
            checksums[step] = state_checksums(pipeline)
        if step == save:
            save_training(store, pipeline, Progress(step, 0, 0, optimizer_steps(pipeline)))
        if step == LAST:
            break
        while len(begun) <= pipeline.config.prefetch_depth and step + len(begun) < LAST:
            begun.append(pipeline.begin_step(step_batches(pipeline, step + len(begun))))
        result = pipeline.train_step(begun.popleft(), pipeline.config.train.optimizer.lr, step == LAST - 1)
        losses[step], norms[step] = result.loss, result.grad_norm
    held_out = {}
    for control in TRAINED[kind].training_controls:
        total, tokens = pipeline.evaluate(step_batches(pipeline, HELD_OUT), {kind: control})
        held_out[control] = total / tokens
    tables = pipeline.stage_tables.tables
    rows = {name: (t.local.start, t.read_rows(t.local.start, t.local.stop)) for name, t in tables.items()}
    pipeline.close()
    return {
        "losses": losses, "norms": norms, "checksums": checksums, "held_out": held_out, "rows": rows,
        "figures": result.memories[kind],
    }  # fmt: skip


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Whole tables of the ranks' parts, by name."""
    parts: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, (start, rows) in result["rows"].items():
            parts.setdefault(name, {})[start] = rows
    return {name: torch.cat([rows for _, rows in sorted(by_start.items())]) for name, by_start in parts.items()}


def check_training(ranks: Any, case: MemoryCase, world: int, **changes: Any) -> None:
    """Losses, norms, tables and controls are those of plain PyTorch, and rows that no step reads do not move."""
    tree = case.config(**changes)
    compare(ranks.run(world, memory_case, tree, case.kind), Plain(case, parse_config(tree)))


def compare(results: Sequence[Mapping[str, Any]], plain: Plain, first: int = 0) -> None:
    """As `check_training`, for the results of a run's ranks from step `first` on."""
    losses, norms, touched = plain.trained
    assert [results[0]["losses"].get(step) for step in range(first, LAST)] == pytest.approx(losses[first:], abs=1e-6)
    assert list(results[0]["norms"].values()) == pytest.approx(norms[first:], rel=1e-4)
    tables = merged(results)
    assert tables.keys() == plain.tables.keys()
    for name, table in tables.items():
        torch.testing.assert_close(table, plain.tables[name].detach(), rtol=0, atol=1e-5)
        assert 0 < touched[name].sum() < len(table)
        assert torch.equal(table[~touched[name]], plain.first[name][~touched[name]])
        assert not torch.equal(table, plain.first[name])
    kind = KINDS[plain.case.kind]
    expected = plain.held_out(list(results[0]["held_out"]))
    assert results[0]["held_out"] == pytest.approx(expected, abs=2e-5)
    assert len({round(loss, 4) for loss in expected.values()}) == len(expected) > 1, "every control changes the loss"
    train, figures = plain.config.train, results[0]["figures"]
    tokens = train.global_batch_size * plain.config.data.sequence_length
    for name, table in kind.tables(plain.shape).items() if isinstance(kind, TokenRowsKind) else ():
        found = figures[str(table.layer)]
        assert found["addresses"] == tokens * kind.row_values(plain.shape, table.layer) // table.width
        assert 0 < found["touched_rows"] <= int(touched[name].sum())
        assert found["row_norms"]["max"] > 0


def check_meshes(ranks: Any, case: MemoryCase, root: Path) -> None:
    """One rank trains as plain PyTorch. Two stages with recomputation that fetch ahead go on from its checkpoint with
    its bits. Two stages of two ranks take over the same state, and go on as plain PyTorch."""
    # ZeRO-1 cuts partitions where the fused AdamW rounds otherwise.
    exact, ahead, folder = {"parallel__zero_stage": 0}, f"{case.kind}__prefetch_depth", str(root)
    tree = case.config(**{ahead: 0}, **exact)
    one = ranks.run(1, memory_case, tree, case.kind, folder, None, SAVE)
    plain = Plain(case, parse_config(tree))
    compare(one, plain)
    again = {"train__recompute": "full", "parallel__pipeline": 2}
    two = ranks.run(2, memory_case, case.config(**{ahead: 2}, **again, **exact), case.kind, folder, SAVE)
    assert two[0]["checksums"] == one[0]["checksums"]
    assert two[0]["losses"] == {step: one[0]["losses"][step] for step in range(SAVE, LAST)}
    kept = {f"{case.kind}__store": "mmap", f"{case.kind}__folder": folder}
    four = ranks.run(4, memory_case, case.config(parallel__pipeline=2, **kept), case.kind, folder, SAVE)
    assert four[0]["checksums"][SAVE] == one[0]["checksums"][SAVE]
    compare(four, plain, SAVE)


def check_resume(ranks: Any, case: MemoryCase, root: Path) -> None:
    """On the widest mesh, with clipping and ZeRO-1: resumed bit for bit."""
    tree = case.config(parallel__pipeline=2, parallel__expert=2, train__optimizer={"lr": 0.003, "clip_norm": 0.5})
    whole = ranks.run(4, memory_case, tree, case.kind, str(root), None, SAVE)
    compare(whole, Plain(case, parse_config(tree)))
    resumed = ranks.run(4, memory_case, tree, case.kind, str(root), SAVE)
    assert resumed[0]["checksums"] == whole[0]["checksums"]
    assert resumed[0]["losses"] == {step: whole[0]["losses"][step] for step in range(SAVE, LAST)}


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "expert": (2, {"parallel__expert": 2}),
    "pipeline-expert-data": (4, {"parallel__pipeline": 2, "parallel__expert": 2}),
    "four-stages": (4, {"parallel__pipeline": 4}),
    "small-micro-batches": (2, {"parallel__pipeline": 2, "train__micro_batch_size": 1}),
    "recomputed": (2, {"parallel__pipeline": 2, "train__recompute": "full"}),
    "tied": (2, {"parallel__pipeline": 2, "model__tie_embeddings": True}),
    "branches": (2, {"parallel__pipeline": 2, "model__hyper_connections": {"branches": 2}}),
}
"""Name -> ranks, and changes."""


def wrong(case: MemoryCase, changes: Mapping[str, Any]) -> str:
    """What is said about a wrong configuration of the small model."""
    with pytest.raises(UserError) as error:
        parse_config(case.config(**changes))
    return str(error.value)


# Folders of Hugging Face


@dataclass(frozen=True)
class Folder:
    """A model with random weights, its run, and its export."""

    case: MemoryCase
    decoder: Decoder
    tables: Tables
    run: CheckpointReader
    out: Path

    def logits(self, ids: Tensor, control: str | None = None) -> Tensor:
        """kmem's own logits of whole sequences."""
        kind, shape = KINDS[self.case.kind], self.decoder.shape
        own = control or kind.trained_control(shape)
        read = self.case.read(shape, self.tables, ids, None, own)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.decoder.logits(self.decoder(ids, positions, memories={self.case.kind: read}))


def folder_of(case: MemoryCase, folder: Path, config: ModelConfig, size: int = 3_000) -> Folder:
    """A run and its export, in weight files of at most `size` bytes."""
    decoder = random_weights(config)
    generator = torch.Generator().manual_seed(1)
    tables = {
        name: torch.randn(table.rows, table.width, generator=generator)
        for name, table in KINDS[case.kind].tables(config.shape).items()
    }
    held: Any = SimpleNamespace(weights=lambda: {**decoder.state_dict(), **tables})
    run = write_run(folder / "run", config, held, recorded=False)  # it is evaluated on text of another tokenizer
    export(run, folder / "out", max_shard_bytes=size, say=str)
    register()
    return Folder(case, decoder, tables, run, folder / "out")


def hf_model(case: MemoryCase, attention: Mapping[str, Any], moe: Any, **changes: Any) -> ModelConfig:
    """A tiny model with the memory, of the vocabulary of the tests' tokenizer."""
    return model(dict(attention), moe, **{case.kind: dict(case.section), **changes})


def token_ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def check_logits(folder: Folder) -> None:
    """Transformers' logits are kmem's, wherever tables are kept, for whole sequences and for prompts in chunks with
    padding; controls change them as kmem's."""
    ids, kind = token_ids(3), folder.case.kind
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[1, :15] = 0
    expected = folder.logits(ids)
    for kept in ("device", "mmap"):
        loaded, info = opened(folder.out, tables=kept, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected, **TOLERANCE)
        memory = loaded.memories[kind]
        for control in KINDS[kind].telling_controls(folder.decoder.shape):
            memory.control = control
            found = loaded(ids, use_cache=False).logits
            assert (found - expected).abs().mean() > 0.01
            if control != "off":
                torch.testing.assert_close(found, folder.logits(ids, control), **TOLERANCE)
        with pytest.raises(ValueError, match=kind):
            memory.control = "none of these"
    cache, parts = None, []  # of the model with mapped tables
    memory.control = KINDS[kind].trained_control(folder.decoder.shape)
    for start, stop in itertools.pairwise([0, 1, 3, 4, 9, 20]):
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
        output = loaded(ids[:, start:stop], **given)
        cache = output.past_key_values
        parts.append(output.logits)
    for found, row, there in zip(torch.cat(parts, 1), ids, mask.bool(), strict=True):
        torch.testing.assert_close(found[there], folder.logits(row[there][None])[0], **TOLERANCE)


def check_generation(folder: Folder, ways: Sequence[str], assistants: Sequence[str] = ()) -> None:
    """With cache as without, for prompts of several lengths."""
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    for way in ways:
        generate_both_ways(opened(folder.out, tables="mmap"), prompts, mask, way)
    for way in assistants:
        check_assisted_decoding(opened(folder.out, tables="mmap"), opened(folder.out), way)


def check_round_trip(folder: Folder, out: Path) -> None:
    """`kmem import` gives every bit back, and a run of the same memory can begin with it."""
    import_folder(folder.out, out, say=str)
    back = CheckpointReader(out)
    assert back.tensors.keys() == folder.run.tensors.keys() >= folder.tables.keys()
    for name in back.tensors:
        assert torch.equal(back.read(name), folder.run.read(name)), name
    assert not plan_load(back.folder, back.commit, folder.run.config, {}).added


def check_refusals(folder: Folder) -> None:
    """What a model that reads token ids cannot do."""
    loaded, field = opened(folder.out), rf"model\.{folder.case.kind}\b"
    with pytest.raises(ValueError, match=rf"{field}.*input_ids.*inputs_embeds"):
        loaded(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match=rf"vocabulary.*{field}"):
        loaded.resize_token_embeddings(VOCABULARY + 8)


@torch.no_grad()
def check_evaluation(folder: Folder, data: Path) -> None:
    """`kmem eval` of the run, as trained and under every control; `data` has fewer ids than the model."""
    kind, shape, decoder = KINDS[folder.case.kind], folder.decoder.shape, folder.decoder
    config = folder.run.config.data.model_copy(update={"sources": (Source(path=str(data)),)})
    held_out = open_data(config, shape.vocab_size).validation
    batch = held_out.read(held_out.spread(2))
    mask = document_mask(batch.document_ids)
    losses = []
    for control in kind.controls:
        if control == "off":
            read = dict.fromkeys(kind.layers(shape), OFF)
        else:
            read = folder.case.read(shape, folder.tables, batch.input_ids, batch.document_ids, control)
        hidden = decoder(batch.input_ids, batch.position_ids, mask, memories={kind.name: read})
        losses.append(decoder.loss(hidden, batch.labels).item() / int((batch.labels >= 0).sum()))
        figures = held_out_figures(folder.run, [str(data)], Choices({kind.name: control}), sequences=2)
        assert figures[str(data)]["loss"] == pytest.approx(losses[-1], abs=1e-5)
    assert len({round(loss, 4) for loss in losses}) == len(kind.controls), "every control changes what is read"
    assert held_out_figures(folder.run, [str(data)], sequences=2)[str(data)]["loss"] == pytest.approx(
        losses[0], abs=1e-5
    )
