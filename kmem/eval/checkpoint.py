"""Held-out loss of a checkpoint, and its answers to questions, in one process."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.controls import Choices
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import ConfigError, DataConfig, Source
from kmem.data.batch import SequenceBatch
from kmem.data.progress import Progress
from kmem.data.reader import PreparedData, SequenceReader, open_data
from kmem.data.tokenizer import load_tokenizer
from kmem.eval.memory_kinds import EvaluatedBank, EvaluatedMemory
from kmem.eval.questions import Answers, Question, answer, read_questions, sample
from kmem.model.decoder import Decoder
from kmem.model.mask import Documents
from kmem.model.memory_kinds import kinds_of
from kmem.parallel.mesh import local_device


class EvaluatedModel:
    """The model of a checkpoint on one device. The rows of its memories stay in the checkpoint's files.

    Raises:
        UserError: a memory lacks its control, or a file is missing or damaged.
    """

    def __init__(self, reader: CheckpointReader, choices: Choices) -> None:
        shape = reader.config.model.shape
        kinds = kinds_of(shape)
        with torch.device("meta"):
            self.decoder = Decoder(shape)
        self.memories: dict[str, EvaluatedMemory] = {}
        self.bank: EvaluatedBank | None = None
        """The bank, whose rows depend on more than the tokens: on the data's addresses or the prompts."""
        for kind in kinds:
            if kind.name == "bank":
                self.memories[kind.name] = self.bank = EvaluatedBank(reader, kind, self.decoder, choices)
            else:
                self.memories[kind.name] = EvaluatedMemory(reader, kind, self.decoder, choices)
        tables = {name for kind in kinds for name in kind.tables(shape)}
        weights = {name: reader.read(name) for name in reader.tensors if name not in tables}
        self.decoder.load_state_dict(weights, assign=True)
        self.decoder.to(local_device()).eval()

    def loss(self, batch: SequenceBatch) -> Tensor:
        """Summed cross entropy of sequences of data."""
        like = self.decoder.projection_weight
        ids, positions, labels = (
            tensor.to(like.device) for tensor in (batch.input_ids, batch.position_ids, batch.labels)
        )
        documents = Documents.of(batch.document_ids)
        attended = None if documents is None else documents.to(like.device)
        read = {kind: memory.of_batch(batch, like) for kind, memory in self.memories.items()}
        hidden = self.decoder(ids, positions, attended, memories=read)
        return self.decoder.loss(hidden, labels)

    def logits(self, ids: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, T, V] of token ids [B, T] on the device, which begin with these prompts."""
        like = self.decoder.projection_weight
        positions = torch.arange(ids.shape[1], device=like.device).expand_as(ids)
        read = {kind: memory.of_prompts(prompts, ids, like) for kind, memory in self.memories.items()}
        return self.decoder.logits(self.decoder(ids, positions, memories=read))


def answered(
    reader: CheckpointReader,
    path: Path,
    choices: Choices | None = None,
    batch: int = 8,
    limit: int | None = None,
) -> list[Answers]:
    """How the model answers a file of questions, by exposures and over all; the contexts are the prompts.

    Args:
        choices: controls of its memories; default: as they were trained.
        batch: questions per forward pass.
        limit: ask at most this many, a sample; None asks all.
    """
    questions = read_questions(path, load_tokenizer(reader.tokenizer_path))
    asked = questions if limit is None else sample(questions, limit)
    model = EvaluatedModel(reader, choices or Choices())

    def forward(ids: Tensor, batched: Sequence[Question]) -> Tensor:
        return model.logits(ids, [question.prompt for question in batched])

    return answer(asked, forward, batch, local_device(), questions)


def held_out_figures(
    reader: CheckpointReader,
    folders: Sequence[str],
    choices: Choices | None = None,
    sequences: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Prepared folder -> bits_per_byte, loss in nats, perplexity and scored tokens.

    Args:
        reader: the checkpoint.
        folders: prepared data; the held-out split is read.
        choices: controls of its memories; default: as they were trained. The data of a model with a bank must have
            addresses in the run's tree.
        sequences: at most this many sequences per folder, spread over the split; None takes all.
        batch: sequences per forward pass.
    """
    model = EvaluatedModel(reader, choices or Choices())
    bank = model.bank
    opened = {folder: _open(reader.config.data, folder, reader, bank) for folder in folders}
    figures = {}
    for folder, data in opened.items():
        held_out, samples = data.validation, data.validation.spread(sequences)
        if bank is not None:
            held_out = bank.around(held_out, Path(folder).expanduser(), samples)
        loss, tokens = _mean_loss(model, held_out, samples, batch, folder)
        figures[folder] = {
            "bits_per_byte": data.bits_per_byte(loss),
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "tokens": tokens,
        }
    return figures


def _open(trained_on: DataConfig, folder: str, reader: CheckpointReader, bank: EvaluatedBank | None) -> PreparedData:
    config = trained_on.model_copy(update={"sources": (Source(path=folder),)})
    if bank is not None:  # the bank's control may need no addresses
        config = config.model_copy(update={"addresses": bank.addresses})
    elif config.addresses is not None:  # all held-out text, whatever the run has read
        config = config.model_copy(update={"addresses": config.addresses.model_copy(update={"subtrees": None})})
    data = open_data(config, reader.config.model.vocab_size)
    stored = reader.commit.progress.data.get("tokenizer", data.tokenizer_fingerprint)
    if stored != data.tokenizer_fingerprint:
        raise ConfigError(
            f"--data {folder}: prepared with another tokenizer than {reader.folder} was trained with; prepare it with "
            f"--tokenizer {reader.tokenizer_path}"
        )
    return data


@torch.no_grad()
def _mean_loss(
    model: EvaluatedModel, held_out: SequenceReader, samples: Sequence[int], batch: int, title: str
) -> tuple[float, int]:
    """(mean cross entropy in nats, scored tokens), as training evaluates."""
    total, tokens = 0.0, 0
    with Progress(f"evaluating {title}", len(samples)) as progress:
        for start in range(0, len(samples), batch):
            sequences = held_out.read(samples[start : start + batch])
            total += float(model.loss(sequences))
            tokens += int((sequences.labels >= 0).sum())
            progress.advance(len(sequences.input_ids))
    return total / max(tokens, 1), tokens
