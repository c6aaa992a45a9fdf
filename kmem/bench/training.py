"""The same training step in kmem and in plain Transformers, with equal weights, batch, dtype and optimizer."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.bench.contest import Runner
from kmem.config import Config, parse_config
from kmem.data.batch import SequenceBatch

EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""Transformers' ways to run experts."""


def random_tokens(config: Config, step: int) -> Tensor:
    """Tokens of a step, int64 [global batch, T + 1]; equal for all contestants."""
    generator = torch.Generator().manual_seed(step)
    size = (config.train.global_batch_size, config.data.sequence_length + 1)
    return torch.randint(config.model.shape.vocab_size, size, generator=generator)


def kmem_runner(tree: dict[str, Any]) -> Runner:
    """A runner of kmem's own pipeline and engine in one process, as `kmem train` runs them."""
    from kmem.parallel.joining import join_mesh
    from kmem.parallel.pipeline import Pipeline

    config = parse_config(tree)
    pipeline = Pipeline(config, join_mesh(config))
    batches = sequence_batches(config, random_tokens)

    def run(steps: int) -> dict[str, Any]:
        phases: dict[str, float] = {}
        losses = []
        prepared = [next(batches) for _ in range(steps)]
        began = time.perf_counter()
        for batch in prepared:
            losses.append(pipeline.train_step(batch, config.train.optimizer.lr).loss)
            for phase, seconds in pipeline.engine.phase_seconds.items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        return {"seconds": time.perf_counter() - began, "losses": losses, "phases": phases}

    return run


def transformers_runner(tree: dict[str, Any], folder: str, experts: str) -> Runner:
    """A runner of a plain loop around the exported model: forward, backward, clip, fused AdamW."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = parse_config(tree)
    bf16 = config.train.precision == "bf16"
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=experts, dtype=torch.float32)
    model.train()
    settings = config.train.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )

    def step(tokens: Tensor) -> float:
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    numbers = itertools.count()

    def run(steps: int) -> dict[str, Any]:
        prepared = [random_tokens(config, next(numbers)) for _ in range(steps)]
        began = time.perf_counter()
        losses = [step(tokens) for tokens in prepared]
        return {"seconds": time.perf_counter() - began, "losses": losses}

    return run


def export_initial_model(config: Config, out: Path) -> str:
    """Write the untrained model of a configuration as a Hugging Face folder; return the name of its model class."""
    from kmem.checkpoint.commit import Progress
    from kmem.checkpoint.reader import CheckpointReader
    from kmem.checkpoint.writer import write_weights
    from kmem.data.tokenizer import train_tokenizer
    from kmem.hf.export import export
    from kmem.model.decoder import Decoder
    from kmem.model.init import initialise_

    shape = config.model.shape
    decoder = Decoder(shape)
    initialise_(decoder, shape, config.train.init_seed)
    weights = decoder.state_dict()
    shapes = {name: weight.shape for name, weight in weights.items()}
    progress = Progress(step=0, consumed_samples=0, tokens=0, optimizer_steps=0)
    root = out.with_name("run") / "checkpoints"
    model = CheckpointReader(write_weights(root, progress, config, shapes, lambda name: [weights[name]]))
    train_tokenizer(iter(["an export needs a tokenizer, this measurement does not"]), 257, model.tokenizer_path)
    return export(model, out, say=lambda text: None).architecture.class_name


def sequence_batches(config: Config, draw: Callable[[Config, int], Tensor]) -> Iterator[list[SequenceBatch]]:
    """The micro-batches of each step, without end, from the tokens [global batch, T + 1] that `draw` gives for it; each
    row is one document."""
    rows = config.train.micro_batch_size
    for step in itertools.count():
        tokens = draw(config, step)
        positions = torch.arange(tokens.shape[1] - 1).expand(rows, -1)
        yield [
            SequenceBatch(part[:, :-1], part[:, 1:], positions, torch.zeros_like(positions))
            for part in tokens.split(rows)
        ]
