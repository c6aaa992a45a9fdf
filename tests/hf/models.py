"""Tiny models of every shape, and checkpoints of them with random weights."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.commit import Progress
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.writer import write_weights
from kmem.config import ModelConfig
from kmem.data.engram_addresses import model_addresses
from kmem.data.tokenizer import tokenizer_record, train_tokenizer
from kmem.hf.importing import starting_config
from kmem.model.decoder import Decoder
from kmem.model.engram import EngramInput
from kmem.model.engram_export import COMPRESSION, ExportedEngram
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_reader import EngramAddresses, table_name, table_rows
from kmem.model.export_tables import RowSource
from kmem.model.exported_memory import ForwardTokens
from kmem.model.shape import Shape

VOCABULARY = 320
TEXT = ["the model reads the text that the export wrote", "and a reader of the text trains another model"] * 8

GQA: dict[str, Any] = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
MLA: dict[str, Any] = {
    "kind": "mla",
    "num_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 16}
SIGMOID: dict[str, Any] = {**EXPERTS, "score_function": "sigmoid", "selection_bias": True}
AS_SCORED: dict[str, Any] = {"renormalize": False}
GROUPS: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "scaling_factor": 2.5}


def model(attention: dict[str, Any], moe: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    base = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 3, "intermediate_size": 48, "init_std": 0.3}
    return ModelConfig.model_validate({**base, "attention": attention, "moe": moe, **changes})


SCALED: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN: dict[str, Any] = {
    "kind": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
"""Of the tiny models' frequencies some are kept, some mixed and some divided."""


NATIVE = {
    "qwen3_moe": model({**GQA, "qk_norm": True}, {**EXPERTS, "first_dense_layers": 1}, rope_theta=5e5),
    "qwen3_moe, tied, scores as they are": model(
        {**GQA, "qk_norm": True}, {**EXPERTS, **AS_SCORED}, tie_embeddings=True
    ),
    "glm4_moe": model(
        {**GQA, "qkv_bias": True, "rotary_fraction": 0.5},
        {**SIGMOID, **GROUPS, "num_shared_experts": 2, "first_dense_layers": 1},
        norm_eps=1e-5,
    ),
    "glm4_moe, qk-norm": model({**GQA, "qk_norm": True}, {**SIGMOID, "num_shared_experts": 1}, tie_embeddings=True),
    "deepseek_v3": model(
        MLA, {**SIGMOID, **GROUPS, "num_shared_experts": 1, "first_dense_layers": 1}, rope_scaling=YARN
    ),
    "deepseek_v3, no shared expert": model({**MLA, "q_lora_rank": None}, SIGMOID),
    "deepseek_v2": model(
        MLA,
        {**EXPERTS, **GROUPS, **AS_SCORED, "group_score_top_k": 1, "num_shared_experts": 2, "first_dense_layers": 1},
    ),
    "deepseek_v2, lite": model(
        {**MLA, "q_lora_rank": None, "latent_norm_eps": 1e-6},
        {**EXPERTS, **AS_SCORED},
        norm_eps=1e-3,
        rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "mixtral": model(GQA, EXPERTS),
    "olmoe": model({"num_heads": 4, "qk_norm": True, "qk_norm_span": "all_heads"}, {**EXPERTS, **AS_SCORED}),
    "qwen2_moe": model(
        {**GQA, "qkv_bias": True},
        {
            **EXPERTS,
            **AS_SCORED,
            "num_shared_experts": 1,
            "shared_intermediate_size": 24,
            "shared_expert_gate": True,
            "first_dense_layers": 1,
        },
    ),
    "qwen3": model({**GQA, "qk_norm": True}, None),
    "qwen2": model({**GQA, "qkv_bias": True}, None, tie_embeddings=True),
    "llama": model(GQA, None, norm_eps=1e-5, tie_embeddings=True),
    "llama, scaled rotary frequencies": model(GQA, None, rope_scaling=SCALED),
}
OWN = {
    "softmax and shared experts": model(
        {**GQA, "qk_norm": True}, {**EXPERTS, "num_shared_experts": 1}, tie_embeddings=True
    ),
    "norm over all heads": model({**GQA, "qk_norm": True, "qk_norm_span": "all_heads"}, None),
    "softmax in groups": model({**GQA, "qk_norm": True, "rotary_fraction": 0.5}, {**EXPERTS, **GROUPS}),
    "latent attention without experts": model(MLA, None),
    "chain of experts": model(
        {**GQA, "qk_norm": True},
        {
            **SIGMOID,
            "num_shared_experts": 1,
            "first_dense_layers": 1,
            "chain": {"iterations": 2, "retrofit_scale": True},
        },
    ),
    "four branches": model({**GQA, "qk_norm": True}, EXPERTS, hyper_connections={"branches": 4}),
    "chain of experts as released": model(
        MLA,
        {
            **EXPERTS,
            "num_shared_experts": 1,
            "renormalize": False,
            "chain": {"iterations": 2, "gates": "shared", "stream": "normed", "norm": "once"},
        },
    ),
}


def memory(
    preset: str, attention: dict[str, Any] = GQA, moe: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """A model with n-gram memory as published in all but its sizes."""
    branches, changes = changes.pop("branches", 1), {"layers": [2, 0], "heads": 2, "row_dim": 6, **changes}
    engram = {"preset": preset, "rows_per_head": 61, **changes}
    return model(attention, moe, engram=engram, hyper_connections={"branches": branches} if branches > 1 else None)


MEMORY = {
    "deepseek": memory("deepseek", branches=4, gate_norm_eps=0.1, conv_norm_eps=0.2),
    "deepseek-v4.1": memory("deepseek-v4.1", MLA, {**SIGMOID, "first_dense_layers": 1}),
    "deepseek-v4.1 in branches": memory("deepseek-v4.1", branches=4, pad_token_id=7),
    "qwen": memory(
        "qwen",
        {**GQA, "qk_norm": True},
        {**EXPERTS, "num_shared_experts": 1, "shared_expert_gate": True},
        conv_dilation=2,
    ),
    "qwen in branches": memory("qwen", layers=[1], branches=4, conv_within_documents=True),
    "deepseek in one stream": memory("deepseek", rows_per_head=[31, 61], compression=False),
}
"""Models with n-gram memory."""


class Remembering(Decoder):
    """A decoder with its tables, for comparison: `tables` holds them whole."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.tables: dict[int, torch.Tensor] = {}

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {**self.state_dict(), **{table_name(layer): table for layer, table in self.tables.items()}}

    def read(self, input_ids: torch.Tensor) -> dict[str, dict[int, EngramInput]]:
        """What the memories of whole sequences read."""
        if not self.tables:
            return {}
        addresses = model_addresses(ModelConfig.model_validate(self.shape.as_dict()), tokenizer())
        sources = {layer: table.__getitem__ for layer, table in self.tables.items()}
        return {"engram": read_engram(self.shape, addresses, sources, input_ids)}


def read_engram(
    shape: Shape,
    addresses: EngramAddresses,
    sources: dict[int, RowSource],
    input_ids: torch.Tensor,
    document_ids: torch.Tensor | None = None,
) -> dict[int, EngramInput]:
    """What the engram of whole sequences reads from tables in memory."""
    memory = ExportedEngram(EngramKind(), shape, {"addressing": addresses.addressing.to_manifest()})
    memory.use(sources)
    tensors = {} if addresses.compression is None else {COMPRESSION: addresses.compression.lookup}
    return memory.inputs(ForwardTokens(input_ids, input_ids, document_ids=document_ids, tensors=tensors))


@functools.cache
def tokenizer() -> Path:
    """The folder of the tokenizer of all these models; it goes when the process does."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    train_tokenizer(iter(TEXT), VOCABULARY, Path(folder.name) / "tokenizer")
    return Path(folder.name) / "tokenizer"


def random_weights(config: ModelConfig, seed: int = 0) -> Remembering:
    """A model in which every tensor matters: no zero biases, no unit norms, biases that change routing."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Remembering(config.shape).eval()
    for name, tensor in decoder.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        scale = 0.1 if name in ("embedding.weight", "head.weight") else 0.2  # logits of about 0.6
        tensor.copy_(1 + scale * values if name.endswith("norm.weight") else scale * values)
    for layer, rows in table_rows(decoder.shape).items():
        decoder.tables[layer] = torch.randn(rows, decoder.shape.engram.row_dim, generator=generator)
    return decoder


def write_run(
    run: Path, config: ModelConfig, decoder: Remembering | None = None, recorded: bool = True
) -> CheckpointReader:
    """A run folder with a checkpoint of these weights and a tokenizer, which the checkpoint records if `recorded`."""
    weights = (decoder or random_weights(config)).weights()
    progress = Progress(
        step=7,
        consumed_samples=56,
        tokens=896,
        optimizer_steps=7,
        data=tokenizer_record(tokenizer()) if recorded else {},
        facts={"loss": 2.5},
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    write_weights(
        run / "checkpoints",
        progress,
        starting_config(run, config),
        shapes,
        lambda name: [weights[name]],
        {"engram": model_addresses(config, tokenizer()).addressing.to_manifest()} if config.engram else {},
    )
    shutil.copytree(tokenizer(), run / "tokenizer")
    return CheckpointReader(run)


def logits(decoder: Decoder, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """kmem's own logits [B, T, V] of sequences without padding."""
    if positions is None:
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    memories = decoder.read(input_ids) if isinstance(decoder, Remembering) else {}
    return decoder.logits(decoder(input_ids, positions, memories=memories))
