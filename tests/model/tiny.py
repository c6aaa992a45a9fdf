"""Tiny models whose every tensor matters."""

from typing import Any

import torch

from kmem.config import ModelConfig
from kmem.model.decoder import Decoder
from kmem.model.shape import Shape

GQA: dict[str, Any] = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
MLA: dict[str, Any] = {
    "kind": "mla",
    "num_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SOFTMAX: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 16}
SIGMOID: dict[str, Any] = {**SOFTMAX, "top_k": 4, "score_function": "sigmoid", "selection_bias": True}
GROUPS: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "scaling_factor": 2.5}
LOSSES: dict[str, Any] = {"aux_loss": 0.3, "sequence_aux_loss": 0.2, "z_loss": 0.1}


def config(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    base = {"vocab_size": 96, "hidden_size": 32, "num_layers": 3, "intermediate_size": 48}
    return ModelConfig.model_validate({**base, "attention": attention or GQA, "moe": moe, **changes})


def shape(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> Shape:
    return config(attention, moe, **changes).shape


def randomise_(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No zero biases, no unit norms, no selection bias that leaves the choice alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        values = 0.2 * torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + values if name.endswith("norm.weight") else values)
    return module


def decoder(model: ModelConfig | Shape) -> Decoder:
    view = model if isinstance(model, Shape) else model.shape
    return randomise_(Decoder(view))


def tokens(rows: int = 2, length: int = 24, vocab_size: int = 96, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and their positions."""
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length).expand(rows, length)


def random(*size: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
