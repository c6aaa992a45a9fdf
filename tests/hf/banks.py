"""Tiny models with memory banks, checkpoints of them with random blocks, and a tree that their contexts descend."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from kmem.checkpoint.commit import Progress
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.writer import write_weights
from kmem.clustering.tree_folder import write_tree
from kmem.config import ModelConfig
from kmem.data.engram_addresses import model_addresses
from kmem.data.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_record
from kmem.hf.importing import starting_config
from kmem.model.bank_embedder import EMBEDDER_FILE, EMBEDDER_FORMAT, EMBEDDER_VERSION, TFIDF_FILE, load_embedder
from kmem.model.bank_fetched import without_blocks
from kmem.model.bank_layout import BankLayout, bank_table_name
from kmem.model.bank_router import ContextRouter
from kmem.model.bank_tree import ClusterTree, read_tree_record
from kmem.model.decoder import Decoder
from tests.hf.models import EXPERTS, GQA, MLA, VOCABULARY, Remembering, model, random_weights, tokenizer
from tests.model.bank_parameters import FetchedBlocks
from tests.model.sentence_encoder import write_embedder

CHILDREN, LEVELS = 3, 2


def bank(attention: dict[str, Any] = GQA, moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A model with a bank; `changes` are those of its section, `others` those of the model."""
    others = changes.pop("others", {})
    section = {"children": CHILDREN, "levels": [5, 3], "generic": {"probability": 0.1}, **changes}
    return model(attention, moe, bank=section, **others)


BANKS = {
    "ffn": bank(),
    "ffn in some layers of experts": bank(
        {**GQA, "qk_norm": True}, EXPERTS, placement="listed", placed_layers=[0, 2], generic={"probability": 0}
    ),
    "lora_ffn": bank(kind="lora_ffn"),
    "lora_qk": bank(kind="lora_qk", placement="last", placed_layers=2),
    "lora_ov": bank(kind="lora_ov"),
    "kv": bank(MLA, kind="kv"),
    "with n-grams": bank(
        levels=[0, 3],
        others={"engram": {"preset": "qwen", "rows_per_head": 61, "layers": [1], "heads": 2, "row_dim": 6}},
    ),
}


class Banked(Remembering):
    """A decoder with its bank, for comparison: `rows` holds each level's table whole."""

    def __init__(self, decoder: Remembering, seed: int) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(decoder.__dict__)
        self.layout = BankLayout.of(self.shape)
        generator = torch.Generator().manual_seed(seed)
        self.rows = {
            level: 0.4 * torch.randn(self.layout.rows(level), self.layout.row_values(level), generator=generator)
            for level in self.layout.levels
        }

    def weights(self) -> dict[str, torch.Tensor]:
        blocks = {}
        for level, rows in self.rows.items():
            for layer, columns in self.layout.by_layer(rows, level).items():
                blocks[f"layers.{layer}.{bank_table_name(level)}"] = columns.contiguous()
        return {**super().weights(), **blocks}

    @torch.no_grad()
    def bank_logits(
        self,
        input_ids: torch.Tensor,
        leaves: torch.Tensor | None,
        generic: bool = False,
        levels: list[int] | None = None,
    ) -> torch.Tensor:
        """kmem's logits of sequences whose contexts have these leaves; None: without the bank."""
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if leaves is None:
            blocks = without_blocks(self.layout)
        else:
            ids = self.layout.row_ids(leaves, generic, levels)
            sources = {level: rows.__getitem__ for level, rows in self.rows.items()}
            blocks = FetchedBlocks.read(self.layout, ids, sources).inputs(input_ids.shape[1])
        memories = self.read(input_ids) | {"bank": blocks}
        return self.logits(Decoder.forward(self, input_ids, positions, memories=memories))


def random_bank(config: ModelConfig, seed: int = 0) -> Banked:
    """A model in which every block matters."""
    return Banked(random_weights(config, seed), seed + 1)


@functools.cache
def tree() -> Path:
    """A tree of random centroids over a random TF-IDF embedder of the models' tokenizer; it goes with the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return make_tree(Path(folder.name) / "tree")


def make_tree(
    folder: Path,
    children: int = CHILDREN,
    levels: int = LEVELS,
    seed: int = 0,
    of_tokenizer: Path | None = None,
    unit: str = "document",
) -> Path:
    dim, generator = 4, torch.Generator().manual_seed(seed)
    embedder = folder.parent / f"{folder.name}-embedder"
    embedder.mkdir(parents=True)
    tensors = {"idf": torch.rand(VOCABULARY, generator=generator)}
    tensors["projection"] = torch.randn(VOCABULARY, dim, generator=generator)
    save_file(tensors, str(embedder / TFIDF_FILE))
    record = {"format": EMBEDDER_FORMAT, "version": EMBEDDER_VERSION, "name": "tfidf", "dim": dim}
    (embedder / EMBEDDER_FILE).write_text(json.dumps(record))
    (embedder / "LICENSE").write_text("That of the data.\n")
    centroids = [0.5 * torch.randn(children**level, dim, generator=generator) for level in range(1, levels + 1)]
    described = {
        "children": children,
        "levels": levels,
        "unit": unit,
        "tokenizer": tokenizer_fingerprint(of_tokenizer or tokenizer()),
    }
    leaves = np.ones(children**levels, dtype=np.int64)
    write_tree(folder, [rows.numpy() for rows in centroids], leaves, embedder, described)
    shutil.rmtree(embedder)
    return folder


def make_sentence_tree(folder: Path, texts: Sequence[str]) -> Path:
    """A tree over a random sentence encoder; its centroids are embeddings of texts, the first ones those of level 1."""
    embedder = write_embedder(folder.parent / f"{folder.name}-embedder", 16, 2)
    (embedder / "LICENSE").write_text("None: random numbers.\n")
    read = load_tokenizer(tokenizer())
    leaves = CHILDREN**LEVELS
    vectors = load_embedder(embedder, read).embed([torch.tensor(read.encode(text)) for text in texts[:leaves]])
    described = {"children": CHILDREN, "levels": LEVELS, "unit": "document", "tokenizer": None}
    centroids = [vectors[: CHILDREN**level].numpy() for level in range(1, LEVELS + 1)]
    write_tree(folder, centroids, np.ones(leaves, dtype=np.int64), embedder, described)
    shutil.rmtree(embedder)
    return folder


def router() -> ContextRouter:
    return ContextRouter.load(tree())


def cluster_tree() -> ClusterTree:
    return ClusterTree.load(tree())


def write_bank_run(
    run: Path, config: ModelConfig, decoder: Banked | None = None, own: Path | None = None
) -> CheckpointReader:
    """A run folder with a checkpoint of these weights, a tokenizer and the tree, `own` if given."""
    weights = (decoder or random_bank(config)).weights()
    data = tokenizer_record(tokenizer())
    start = starting_config(run, config)
    start = start.model_copy(update={"data": start.data.model_copy(update={"sequence_length": 24})})
    engram = {"engram": model_addresses(config, tokenizer()).addressing.to_manifest()} if config.engram else {}
    write_weights(
        run / "checkpoints",
        Progress(step=7, consumed_samples=56, tokens=896, optimizer_steps=7, data=data, facts={"loss": 2.5}),
        start,
        {name: tuple(tensor.shape) for name, tensor in weights.items()},
        lambda name: [weights[name]],
        {**engram, "bank": read_tree_record(own or tree())},
    )
    shutil.copytree(tokenizer(), run / "tokenizer")
    shutil.copytree(own or tree(), run / "tree")
    return CheckpointReader(run)
