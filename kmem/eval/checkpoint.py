"""Held-out loss of a checkpoint, and how it answers questions, in one process."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.bank.layout import bank_layout, bank_tensors
from kmem.checkpoint.engram import checkpoint_engram
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import ConfigError, DataConfig, Source
from kmem.data.progress import Progress
from kmem.data.reader import PreparedData, open_data
from kmem.data.tokenizer import load_tokenizer
from kmem.eval.bank import BankChoice, EvaluatedBank
from kmem.eval.questions import Answers, Question, answer, read_questions, sample
from kmem.model.decoder import Decoder
from kmem.model.engram_ngrams import NgramAddressing
from kmem.model.engram_reader import EngramReader, RowSource, table_name
from kmem.model.mask import document_mask
from kmem.parallel.mesh import local_device

SHUFFLE_SEED = 0


def answered(
    reader: CheckpointReader,
    path: Path,
    memory: str = "on",
    batch: int = 8,
    bank: BankChoice | None = None,
    limit: int | None = None,
) -> list[Answers]:
    """How the model answers a file of questions, by their exposures and over all; a bank's contexts are the prompts.

    Args:
        memory: one of `kmem.eval.command.MEMORY`.
        batch: questions per forward pass.
        bank: how a model's memory bank is evaluated; default: fetched.
        limit: ask at most so many, a sample; None asks all.
    """
    questions = read_questions(path, load_tokenizer(reader.tokenizer_path))
    asked = questions if limit is None else sample(questions, limit)
    blocks = None
    if reader.config.model.bank is not None:
        blocks = EvaluatedBank(reader, BankChoice() if bank is None else bank)
    model, rows = _load(reader, memory)
    device = local_device()

    def forward(ids: Tensor, batched: Sequence[Question]) -> Tensor:
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        found = None if rows is None else rows.read(ids, torch.zeros_like(ids))
        prompts = [question.prompt for question in batched]
        fetched = None if blocks is None else blocks.of_prompts(prompts, ids, model.projection_weight)
        return model.logits(model(ids, positions, engram=found, bank=fetched))

    return answer(asked, forward, batch, device, questions)


def held_out_figures(
    reader: CheckpointReader,
    folders: Sequence[str],
    memory: str = "on",
    sequences: int | None = None,
    batch: int = 8,
    bank: BankChoice | None = None,
) -> dict[str, dict[str, float]]:
    """Of each prepared folder: bits_per_byte, loss in nats, perplexity and scored tokens.

    Args:
        reader: the checkpoint.
        folders: prepared data; the held-out split is read.
        memory: one of `kmem.eval.command.MEMORY`.
        sequences: at most this many of a folder, spread over the split; None takes all.
        batch: sequences per forward pass.
        bank: how a model's memory bank is evaluated; default: with the addresses of the data, which must have some of
            the run's tree.
    """
    blocks = None
    if reader.config.model.bank is not None:
        blocks = EvaluatedBank(reader, BankChoice() if bank is None else bank)
    opened = {folder: _open(reader.config.data, folder, reader, blocks) for folder in folders}
    if blocks is not None:
        for folder, data in opened.items():
            samples = data.validation.spread(sequences)
            held_out = blocks.around(data.validation, Path(folder).expanduser(), samples)
            opened[folder] = replace(data, validation=held_out)
    model, rows = _load(reader, memory)
    figures = {}
    for folder, data in opened.items():
        loss, tokens = _mean_loss(model, rows, blocks, data, sequences, batch, folder)
        figures[folder] = {
            "bits_per_byte": data.bits_per_byte(loss),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "tokens": tokens,
        }
    return figures


def _open(
    trained_on: DataConfig, folder: str, reader: CheckpointReader, bank: EvaluatedBank | None = None
) -> PreparedData:
    config = trained_on.model_copy(update={"sources": (Source(path=folder),)})
    addressing = None
    if bank is not None:  # its control may need no addresses
        config, addressing = config.model_copy(update={"addresses": None}), bank.addressing
    elif config.addresses is not None:  # all held-out text, whatever the run has read
        config = config.model_copy(update={"addresses": config.addresses.model_copy(update={"subtrees": None})})
    data = open_data(config, reader.config.model.vocab_size, addressing)
    stored = reader.commit.progress.data.get("tokenizer", data.tokenizer_fingerprint)
    if stored != data.tokenizer_fingerprint:
        raise ConfigError(
            f"--data {folder}: prepared with another tokenizer than {reader.folder} was trained with; prepare it with "
            f"--tokenizer {reader.tokenizer_path}"
        )
    return data


def _load(reader: CheckpointReader, control: str) -> tuple[Decoder, EngramReader | None]:
    """The model without its memory bank, and its n-gram memory, whose rows stay in the checkpoint's files."""
    with torch.device("meta"):
        model = Decoder(reader.config.model.shape)
    memory = checkpoint_engram(reader, model)
    tables = bank_tensors(bank_layout(reader.config))
    tables |= set() if memory is None else {table_name(layer) for layer in memory.sources}
    model.load_state_dict({name: reader.read(name) for name in reader.tensors if name not in tables}, assign=True)
    if memory is not None and control == "off":
        for index in memory.sources:
            model.layers[index].register_module("engram", None)
        memory = None
    elif memory is not None and control != "on":
        addressing = memory.addresses.addressing
        for table, index in enumerate(addressing.layers):
            memory.sources[index] = _otherwise(memory.sources[index], addressing, table, control)
    return model.to(local_device()).eval(), memory


def _otherwise(source: RowSource, addressing: NgramAddressing, table: int, control: str) -> RowSource:
    """Rows that n-grams do not own: the first of each head, or, shuffled, those a fixed random distance on in their
    head, so that each row is read by exactly one other address."""
    sizes, first = torch.tensor(addressing.sizes[table]), torch.tensor(addressing.offsets(table))
    draw = random.Random(f"{SHUFFLE_SEED} {table}")
    distance = torch.tensor([draw.randrange(1, size) for size in addressing.sizes[table]])

    def read(rows: Tensor) -> Tensor:
        here = rows.cpu()
        other = first.expand_as(here) if control == "single-row" else (here - first + distance) % sizes + first
        return source(other.to(rows.device))

    return read


@torch.no_grad()
def _mean_loss(
    model: Decoder,
    memory: EngramReader | None,
    bank: EvaluatedBank | None,
    data: PreparedData,
    sequences: int | None,
    batch: int,
    title: str,
) -> tuple[float, int]:
    """(mean cross entropy in nats, scored tokens), as training evaluates."""
    samples, device = data.validation.spread(sequences), local_device()
    total, tokens = 0.0, 0
    with Progress(f"evaluating {title}", len(samples)) as progress:
        for start in range(0, len(samples), batch):
            rows = data.validation.read(samples[start : start + batch])
            ids, positions, labels, documents = (
                tensor.to(device) for tensor in (rows.input_ids, rows.position_ids, rows.labels, rows.document_ids)
            )
            found = None if memory is None else memory.read(ids, documents)
            blocks = None if bank is None else bank.of_batch(rows, model.projection_weight)
            hidden: Tensor = model(ids, positions, document_mask(documents), engram=found, bank=blocks)
            total += float(model.loss(hidden, labels))
            tokens += int((labels >= 0).sum())
            progress.advance(len(rows.input_ids))
    return total / max(tokens, 1), tokens
