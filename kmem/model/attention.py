"""Causal self-attention: grouped-query (GQA) and multi-head latent (MLA)."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mask import Documents
from .matmul import HAS_AMX, Linear
from .memory_kind import NO_MEMORIES, LayerMemories
from .norm import RMSNorm
from .rope import Rotation, rotate, softmax_factor
from .shape import Shape

# Shape letters: B sequences, T tokens (queries), S tokens with keys, the cached ones included, H hidden size, D width
# of a head.


class KeyValueCache(Protocol):
    """The method of a key-value cache that attention calls; Transformers' `Cache` classes have it."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, T, D] of a layer and return all its keys and values [B, heads, S, D]."""


def build_attention(shape: Shape, index: int) -> nn.Module:
    """The attention of layer `index`; `shape.attention.kind` chooses the class."""
    return {"gqa": GroupedQueryAttention, "mla": LatentAttention}[shape.attention.kind](shape, index)


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share key/value heads in groups (arXiv 2305.13245).

    Optionally, an RMSNorm acts on the queries and keys before the rotation, over each head (Qwen3) or over all heads
    together (OpenLM). Optionally, only a part of each head is rotated (GLM-4).
    """

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        attention, width = shape.attention, shape.head_dim
        self.index, self.head_dim = index, width
        kv_heads = attention.num_kv_heads or attention.num_heads
        self.q_proj = Linear(shape.hidden_size, attention.num_heads * width, bias=attention.qkv_bias)
        self.k_proj = Linear(shape.hidden_size, kv_heads * width, bias=attention.qkv_bias)
        self.v_proj = Linear(shape.hidden_size, kv_heads * width, bias=attention.qkv_bias)
        self.o_proj = Linear(attention.num_heads * width, shape.hidden_size, bias=False)
        self.norm_all_heads = attention.get("qk_norm_span", "head") == "all_heads"  # older models lack the field
        widths = (attention.num_heads * width, kv_heads * width) if self.norm_all_heads else (width, width)
        self.q_norm, self.k_norm = (
            RMSNorm(span, shape.norm_eps) if attention.qk_norm else nn.Identity() for span in widths
        )

    def forward(
        self,
        hidden_BTH: Tensor,
        rotation: Rotation,
        mask: Tensor | Documents | None = None,
        cache: KeyValueCache | None = None,
        memories: LayerMemories = NO_MEMORIES,
    ) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]; `mask` as in `DecoderLayer`."""
        query, key, value = self.q_proj(hidden_BTH), self.k_proj(hidden_BTH), self.v_proj(hidden_BTH)
        query = memories.project("q_proj", hidden_BTH, query)
        key = memories.project("k_proj", hidden_BTH, key)
        value = memories.project("v_proj", hidden_BTH, value)
        if self.norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key, value))
        if not self.norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        rotated, key = rotate(query, rotation), rotate(key, rotation)
        out = memories.attend(query, attend(rotated, key, value, mask, cache, self.index))
        return memories.project("o_proj", out, self.o_proj(out))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Head layouts: query [nope | rope], kv_b [key nope | value], kv_a [compressed | key rope]. All heads share the
    rotated part of the key.
    """

    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        attention = shape.attention
        eps = attention.get("latent_norm_eps") or shape.norm_eps  # models saved before lack the field
        self.index = index
        self.nope, self.rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        self.value = attention.v_head_dim
        self.kv_rank = attention.kv_lora_rank
        query_width = attention.num_heads * (self.nope + self.rope)
        if attention.q_lora_rank is None:
            self.q_proj = Linear(shape.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = Linear(shape.hidden_size, attention.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(attention.q_lora_rank, eps)
            self.q_b_proj = Linear(attention.q_lora_rank, query_width, bias=False)
        self.kv_a_proj = Linear(shape.hidden_size, self.kv_rank + self.rope, bias=False)
        self.kv_a_norm = RMSNorm(self.kv_rank, eps)
        self.kv_b_proj = Linear(self.kv_rank, attention.num_heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(attention.num_heads * self.value, shape.hidden_size, bias=False)
        self.compressed_query = attention.q_lora_rank is not None
        factor = softmax_factor(shape)
        self.scale = None if factor == 1 else factor * (self.nope + self.rope) ** -0.5

    def forward(
        self,
        hidden_BTH: Tensor,
        rotation: Rotation,
        mask: Tensor | Documents | None = None,
        cache: KeyValueCache | None = None,
        memories: LayerMemories = NO_MEMORIES,
    ) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]; `mask` as in `DecoderLayer`. The cache holds expanded keys and
        values."""
        if self.compressed_query:
            query = self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_BTH)))
        else:
            query = self.q_proj(hidden_BTH)
        query = query.unflatten(-1, (-1, self.nope + self.rope))
        query_nope, query_rope = query.split((self.nope, self.rope), dim=-1)
        compressed, key_rope = self.kv_a_proj(hidden_BTH).split((self.kv_rank, self.rope), dim=-1)
        key_value = self.kv_b_proj(self.kv_a_norm(compressed)).unflatten(-1, (-1, self.nope + self.value))
        key_nope, value = key_value.split((self.nope, self.value), dim=-1)
        key_rope = rotate(key_rope.unsqueeze(2), rotation).expand(-1, -1, key_nope.shape[2], -1)
        rotated = torch.cat((query_nope, rotate(query_rope, rotation)), dim=-1)
        key = torch.cat((key_nope, key_rope), dim=-1)
        out = memories.attend(query, attend(rotated, key, value, mask, cache, self.index, self.scale))
        return self.o_proj(out)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Documents | None = None,
    cache: KeyValueCache | None = None,
    index: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of heads [B, T, heads, D]; returns [B, T, heads * value width].

    Args:
        mask: as in `DecoderLayer`.
        cache: gets the keys and values of layer `index`, and returns those of all its tokens.
        scale: factor of the scores; None: the inverse root of D.
    """
    if isinstance(mask, Documents):
        batches = zip(mask.pad(query), mask.pad(key), mask.pad(value), strict=True)
        return mask.unpad([attend(q, k, v, scale=scale) for q, k, v in batches], len(query))
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, index)
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and not HAS_AMX:
        # On a CPU without matrix units, torch's bf16 attention takes twice as long as its fp32 attention.
        return _attend_heads(query.float(), key.float(), value.float(), mask, scale).to(query.dtype)
    return _attend_heads(query, key, value, mask, scale)


def _attend_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As `attend`, for heads [B, heads, T, D]; the queries are the last T of S positions."""
    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    # Torch's CPU kernels compute all scores of a few hundred tokens, masked ones included. Four blocks of queries skip
    # most of the scores that causality masks: attention over 256 tokens takes a quarter less time. From 768 tokens on
    # the kernels skip them too.
    in_blocks = mask is None and query.device.type == "cpu" and 256 <= queries < 768
    step = -(-queries // 4) if in_blocks else queries
    outs_BThD = []
    for start in range(0, queries, step):
        block, seen = slice(start, start + step), past + min(start + step, queries)
        query_block = query[:, :, block]
        size, allowed = query_block.shape[2], mask
        if mask is None and 1 < size < seen:  # is_causal would align the block to the first key
            allowed = torch.ones(size, seen, dtype=torch.bool, device=query.device).tril(seen - size)
        out = F.scaled_dot_product_attention(
            query_block,
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=allowed,
            is_causal=mask is None and size == seen,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outs_BThD.append(out.transpose(1, 2))
    out_BThD = torch.cat(outs_BThD, dim=1) if len(outs_BThD) > 1 else outs_BThD[0]
    return out_BThD.flatten(2)
