"""The small model, batches and case functions that the distributed tests share."""

from __future__ import annotations

import itertools
from collections import deque
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kmem.config import parse_config
from kmem.data.batch import SequenceBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kmem.checkpoint.store import CheckpointStore
    from kmem.config import Config, RowOptimizerConfig
    from kmem.model.engram_reader import EngramAddresses
    from kmem.parallel.pipeline import Pipeline, StepResult
    from kmem.parallel.stage_tables import BegunStep

VOCABULARY, LENGTH = 96, 16


def small_config(**changes: Any) -> dict[str, Any]:
    """A tiny MoE with everything that could depend on the mesh switched on; dotted changes."""
    tree: dict[str, Any] = {
        "name": "case",
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 4,
            "intermediate_size": 48,
            "init_std": 0.1,
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
            "moe": {
                "num_experts": 4,
                "top_k": 2,
                "intermediate_size": 32,
                "num_shared_experts": 1,
                "first_dense_layers": 1,
                "score_function": "sigmoid",
                "selection_bias": True,
                "bias_update_rate": 0.01,
                "sequence_aux_loss": 0.01,
                "z_loss": 0.001,
            },
        },
        "data": {"sources": [{"path": "none"}], "sequence_length": LENGTH},
        "train": {
            "steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "optimizer": {"lr": 0.01, "clip_norm": 0.5},
        },
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = deepcopy(value)  # later changes may lie within it
    return tree


def synthetic_sequences(samples: list[int]) -> SequenceBatch:
    """Sequences of two or three documents that follow from the sample number alone; boundaries are not trained."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample)
        tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)
        tokens[1::2] = (tokens[:-1:2] * 3 + 1) % VOCABULARY  # half of it can be learned
        documents = (torch.arange(LENGTH + 1) >= 3 + sample % 5).long() + (torch.arange(LENGTH + 1) >= 11).long()
        labels = torch.where(documents[1:] == documents[:-1], tokens[1:], -100)
        starts = torch.nn.functional.pad((documents[1:] != documents[:-1]).long(), (1, 0))[:LENGTH]
        indices = torch.arange(LENGTH)
        positions = indices - torch.where(starts.bool(), indices, 0).cummax(0).values
        rows.append((tokens[:-1], labels, positions, documents[:-1]))
    return SequenceBatch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def train_plainly(
    config: Config,
    model: torch.nn.Module,
    tables: Mapping[str, torch.nn.Parameter],
    rows: RowOptimizerConfig,
    steps: int,
    loss_of: Callable[[SequenceBatch], torch.Tensor],
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Autograd, AdamW and SparseAdam on the whole model and the whole batch, written out: losses, norms of the weights'
    gradients, and of each table whether a step touched its rows."""
    optimizer = config.train.optimizer
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim >= 2 and not name.endswith("_norm.weight")]
    rest = [p for name, p in named.items() if p.ndim < 2 or name.endswith("_norm.weight")]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
    )  # fmt: skip
    rate = optimizer.lr * rows.lr_multiplier
    sparse = torch.optim.SparseAdam(list(tables.values()), lr=rate, betas=rows.betas, eps=rows.eps)
    batch, losses, norms = config.train.global_batch_size, [], []
    touched = {name: torch.zeros(len(table), dtype=torch.bool) for name, table in tables.items()}
    for step in range(steps):
        loss = loss_of(synthetic_sequences(list(range(step * batch, (step + 1) * batch))))
        for parameter in itertools.chain(named.values(), tables.values()):
            parameter.grad = None
        loss.backward()
        for name, table in tables.items():
            touched[name][table.grad.coalesce().indices()[0]] = True
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), optimizer.clip_norm or float("inf")).item())
        adam.step()
        sparse.step()
        losses.append(loss.item())
    return losses, norms, touched


def train_case(tree: dict[str, Any], steps: int, evaluate_every: int = 0) -> dict[str, Any]:
    """Train `steps` steps from scratch; losses, gradient norms, expert loads, and this rank's rows of tables."""
    pipeline = build(tree)
    begun: deque[BegunStep] = deque()
    results = []
    for step in range(steps):
        while len(begun) <= pipeline.config.prefetch_depth and step + len(begun) < steps:
            begun.append(pipeline.begin_step(step_batches(pipeline, step + len(begun))))
        sampled = pipeline.config.model.bank is not None and step == steps - 1
        results.append(pipeline.train_step(begun.popleft(), pipeline.config.train.optimizer.lr, sampled))
        if evaluate_every and step % evaluate_every == 0:
            pipeline.evaluate(step_batches(pipeline, 1000 + step))
    tables = pipeline.stage_tables.tables
    rows = {name: (t.local.start, t.read_rows(t.local.start, t.local.stop)) for name, t in tables.items()}
    blocks = bank_blocks(pipeline)
    pipeline.close()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "counts": [result.routing.counts.tolist() if result.routing else None for result in results],
        "rows": rows,
        "blocks": blocks,
        "engram": by_number(results[-1].memories.get("engram")),
        "bank": [by_number(result.memories.get("bank")) for result in results],
    }


def by_number(figures: dict[str, dict[str, Any]] | None) -> dict[int, SimpleNamespace]:
    """A memory's figures by layer or level."""
    return {int(number): SimpleNamespace(**found) for number, found in (figures or {}).items()}


def bank_blocks(pipeline: Pipeline) -> dict[str, tuple[int, torch.Tensor]]:
    """Name of the blocks of a layer and level -> this rank's first row, and its rows."""

    from kmem.model.bank_layout import layer_bank_name
    from kmem.parallel.bank_kind import StageBank

    found = {}
    for memory in pipeline.context.memories:
        for stage_table in memory.tables if isinstance(memory, StageBank) else ():
            table = pipeline.stage_tables.tables[stage_table.spec(pipeline.config).name]
            rows = table.read_rows(table.local.start, table.local.stop)
            for layer, blocks in memory.layout.by_layer(rows, stage_table.level).items():
                found[layer_bank_name(layer, stage_table.level)] = table.local.start, blocks.clone()
    return found


def checkpoint_case(
    tree: dict[str, Any],
    root: str,
    load: int | None,
    save: int | None,
    last: int,
    asynchronous: bool = False,
    forget_moments: bool = False,
    tree_record: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the checkpoint of step `load` (or start afresh), train to step `last`, saving after step `save`."""
    from kmem.checkpoint.commit import Progress, step_folder
    from kmem.checkpoint.store import CheckpointStore
    from kmem.parallel.training_state import model_state, optimizer_steps
    from kmem.train.saving import save_training

    pipeline = build(tree, tree_record)
    store = CheckpointStore(Path(root))
    step = 0
    if load is not None:
        step = load_checkpoint(store, step_folder(Path(root), load), pipeline)
        assert step == load
        if forget_moments:
            for pieces in (v for k, v in model_state(pipeline, saving=False, moments=True).items() if "exp_avg" in k):
                for _, part in pieces.parts:
                    part.zero_()
    losses = {}
    checksums = None
    while True:
        if step == (load if load is not None else save) and checksums is None:
            checksums = state_checksums(pipeline)
        if step == save:
            progress = Progress(step, 0, 0, optimizer_steps(pipeline))
            save_training(store, pipeline, progress, asynchronous)
        if step == last:
            break
        losses[step] = train_step(pipeline, step).loss
        step += 1
    store.wait()
    pipeline.close()
    return {"losses": losses, "checksums": checksums}


def load_checkpoint(store: CheckpointStore, folder: Path, pipeline: Pipeline) -> int:
    """Fill a pipeline from a checkpoint of its own run; the step it was saved after."""
    from kmem.train.load_plan import plan_load
    from kmem.train.saving import load_training

    commit = store.open(folder)
    plan = plan_load(folder, commit, pipeline.config, pipeline.prepared)
    return load_training(store, folder, commit, pipeline, plan).step


def build(tree: dict[str, Any], tree_record: dict[str, Any] | None = None) -> Pipeline:
    """Join the mesh and build this rank's pipeline.

    Args:
        tree_record: description of the cluster tree of a bank.
    """
    from kmem.parallel.joining import join_mesh
    from kmem.parallel.pipeline import Pipeline

    config = parse_config(tree)
    return Pipeline(config, join_mesh(config), prepared(config, tree_record))


def prepared(config: Config, tree_record: dict[str, Any] | None) -> dict[str, Any]:
    """What the memories of the synthetic model need beyond its configuration."""
    from kmem.parallel.memory_kinds import kinds_of

    special = {"engram": lambda: synthetic_addresses(config), "bank": lambda: tree_record}
    return {
        kind.name: special[kind.name]() if kind.name in special else kind.prepare(config, Path())
        for kind in kinds_of(config.model.shape)
    }


def synthetic_addresses(config: Config) -> EngramAddresses | None:
    """Addresses of the synthetic vocabulary, which needs no tokenizer. Its compression pairs neighbouring ids."""
    from kmem.model.engram_reader import EngramAddresses

    if config.model.engram is None:
        return None
    return EngramAddresses.build(config.model.shape, eos_token_id=0, tokenizer=PairingTokenizer())


class PairingTokenizer:
    """Tokens 2k and 2k + 1 read alike."""

    def get_vocab_size(self, with_added_tokens: bool) -> int:
        return VOCABULARY

    def id_to_token(self, token: int) -> str:
        return f"token {token}"

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return f"{'Word' if tokens[0] % 2 else 'word'} {tokens[0] // 2}"


def train_step(pipeline: Pipeline, step: int, sampled: bool = False) -> StepResult:
    """Step number `step` of the synthetic data."""
    lr = pipeline.config.train.optimizer.lr
    return pipeline.train_step(step_batches(pipeline, step), lr=lr, sampled=sampled)


def step_batches(pipeline: Pipeline, step: int) -> list[SequenceBatch]:
    """This rank's micro-batches of a step."""
    from kmem.parallel.pipeline import split_samples

    train = pipeline.config.train
    plan = split_samples(step * train.global_batch_size, train.global_batch_size, train.micro_batch_size, pipeline.mesh)
    batches = [synthetic_sequences(samples) for samples in plan]
    bank = pipeline.config.model.bank
    if bank is None:
        return batches
    from tests.distributed.bank_case import addressed

    generic = bank.generic.probability > 0
    return [addressed(batch, samples, generic) for batch, samples in zip(batches, plan, strict=True)]


def state_checksums(pipeline: Pipeline) -> dict[str, str]:
    """sha256 of every whole tensor of the state, gathered from all ranks; equal on every mesh for equal states."""
    import hashlib

    import torch.distributed as dist

    from kmem.parallel.training_state import model_state

    mine = {
        name: (pieces.length, pieces.to_host().parts)
        for name, pieces in model_state(pipeline, saving=True, moments=True).items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for pieces_of_rank in everyone:
        for name, (size, parts) in pieces_of_rank.items():
            tensor = whole.setdefault(name, torch.full((size,), float("nan")))
            for start, part in parts:
                tensor[start : start + part.numel()] = part
    assert not any(tensor.isnan().any() for tensor in whole.values()), "a piece of the state is missing"
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}


def thread_count() -> tuple[int, dict[str, int]]:
    """Threads of this rank process by name."""
    import os

    names: dict[str, int] = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            name = file.read().strip()
        names[name] = names.get(name, 0) + 1
    return sum(names.values()), names
