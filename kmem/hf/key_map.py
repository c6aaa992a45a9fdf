"""Which tensor of a Hugging Face folder holds which rows of which kmem tensor.

One table serves every native architecture and both directions. On disk a folder has one tensor per expert and
projection (Transformers stacks them while loading), so a stack of experts is cut into pieces; everything else is one
piece. A piece always is a range of rows, which lets models larger than memory pass through.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from kmem.config import LatentAttention, ModelConfig, UserError
from kmem.hf.architectures import KMEM
from kmem.hf.native import DEEPSEEK_V3, Architecture
from kmem.model.bank_layout import BankLayout, bank_table_part_name, layer_bank_name
from kmem.model.engram_export import COMPRESSION
from kmem.model.engram_reader import table_name, table_part_name, table_rows
from kmem.parallel.parameter_counts import tensor_shapes
from kmem.wording import counted

LISTED = 20  # differences named in an error

# kmem name -> name in a native folder; {expert} is a number. Several names share the
# rows of a tensor evenly.
TABLE: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
LAYER_TABLE: dict[str, tuple[str, ...]] = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
    # grouped-query attention
    "attention.q_proj.weight": ("self_attn.q_proj.weight",),
    "attention.k_proj.weight": ("self_attn.k_proj.weight",),
    "attention.v_proj.weight": ("self_attn.v_proj.weight",),
    "attention.q_proj.bias": ("self_attn.q_proj.bias",),
    "attention.k_proj.bias": ("self_attn.k_proj.bias",),
    "attention.v_proj.bias": ("self_attn.v_proj.bias",),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.o_proj.weight": ("self_attn.o_proj.weight",),
    # latent attention
    "attention.q_a_proj.weight": ("self_attn.q_a_proj.weight",),
    "attention.q_a_norm.weight": ("self_attn.q_a_layernorm.weight",),
    "attention.q_b_proj.weight": ("self_attn.q_b_proj.weight",),
    "attention.kv_a_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_b_proj.weight": ("self_attn.kv_b_proj.weight",),
    # dense feed-forward
    "feed_forward.gate_proj.weight": ("mlp.gate_proj.weight",),
    "feed_forward.up_proj.weight": ("mlp.up_proj.weight",),
    "feed_forward.down_proj.weight": ("mlp.down_proj.weight",),
    # mixture of experts
    "feed_forward.router.weight": ("mlp.gate.weight",),
    "feed_forward.router.selection_bias": ("mlp.gate.e_score_correction_bias",),
    "feed_forward.shared_experts.gate_proj.weight": ("mlp.shared_experts.gate_proj.weight",),
    "feed_forward.shared_experts.up_proj.weight": ("mlp.shared_experts.up_proj.weight",),
    "feed_forward.shared_experts.down_proj.weight": ("mlp.shared_experts.down_proj.weight",),
    "feed_forward.experts.gate_up_proj": (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    ),
    "feed_forward.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
}
STACKED = {
    "feed_forward.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "feed_forward.experts.down_proj": "mlp.experts.down_proj",
}
"""Stacks of experts -> the Transformers parameter that their pieces become when it loads the folder."""


WIDE = ".selection_bias"
"""End of the names of tensors that stay in fp32 whatever the folder's dtype: the bias moves in steps that bf16 cannot
resolve."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """One tensor of a folder: rows [start, stop) of a kmem tensor, or of one expert of a stack."""

    name: str
    """Its name on disk."""
    shape: tuple[int, ...]
    """Its shape."""
    parameter: str
    """The parameter of the Transformers model that it becomes, or becomes a part of."""
    tensor: str | None
    """kmem's tensor; None for one that is no weight: the compression of the vocabulary, or a tensor without elements
    that the architecture insists on; and where `beside` has several."""
    start: int = 0
    expert: int | None = None
    """Index into the stack's first dimension; None for a tensor that is no stack."""
    dtype: torch.dtype | None = None
    """Its dtype where that is not the folder's."""
    beside: tuple[str, ...] = ()
    """kmem's tensors whose rows stand side by side in it: the layers' blocks of a memory bank."""

    @property
    def stop(self) -> int:
        """End of its rows."""
        return self.start + self.shape[0]


def folder_pieces(
    model: ModelConfig,
    architecture: Architecture,
    table_parts: Mapping[int, Sequence[int]] | None = None,
    bank_parts: Mapping[int, Sequence[int]] | None = None,
) -> list[Piece]:
    """The tensors of a folder of this architecture, in kmem's order; together they hold every row once.

    Args:
        table_parts: layer -> rows of each tensor that holds a range of its table's rows; default: one tensor.
        bank_parts: level -> the same of the level's table.
    """
    tensors, whole = tensor_shapes(model), model.shape
    tables = {table_name(layer): layer for layer in table_rows(whole)}
    layout = None if whole.bank is None else BankLayout.of(whole)
    blocks = set() if layout is None else {name for level in layout.levels for name in _columns(layout, level)}
    found = []
    for tensor, shape in tensors.items():
        if tensor in blocks:
            continue
        if tensor in tables:
            layer = tables[tensor]
            found += _table(layer, (table_parts or {}).get(layer, [shape[0]]), shape[1])
        else:
            found += (_own if architecture is KMEM else _native)(tensor, tuple(shape))
    if layout is not None:
        for level in layout.levels:
            found += _bank(layout, level, (bank_parts or {}).get(level, [layout.rows(level)]))
    if model.engram is not None and model.engram.compression:
        found.append(Piece(COMPRESSION, (model.vocab_size,), COMPRESSION, None, dtype=torch.int64))
    if architecture is DEEPSEEK_V3:
        found += _empty_shared_experts(model)
    assert len({piece.name for piece in found}) == len(found)
    kept = sum(prod(piece.shape) for piece in found if piece.tensor or piece.beside)
    assert kept == sum(map(prod, tensors.values()))
    return found


def table_parts(model: ModelConfig, itemsize: int, max_bytes: int) -> dict[int, list[int]]:
    """Layer -> rows of each tensor of its table, near equal and at most `max_bytes` long with values of `itemsize`."""
    shape = model.shape
    return {
        layer: _near_equal(rows, shape.engram.row_dim * itemsize, max_bytes)
        for layer, rows in table_rows(shape).items()
    }


def bank_parts(model: ModelConfig, itemsize: int, max_bytes: int) -> dict[int, list[int]]:
    """Level -> rows of each tensor of its table, as `table_parts`; one row at least, however long it is."""
    shape = model.shape
    if shape.bank is None:
        return {}
    layout = BankLayout.of(shape)
    return {
        level: _near_equal(layout.rows(level), layout.row_values(level) * itemsize, max_bytes)
        for level in layout.levels
    }


def _near_equal(rows: int, row_bytes: int, max_bytes: int) -> list[int]:
    count = -(-rows // max(1, max_bytes // row_bytes))
    return [rows // count + (part < rows % count) for part in range(count)]


def parameters(pieces: Iterable[Piece], tensors: Shapes) -> dict[str, Sequence[int]]:
    """Name -> shape of the Transformers parameters that these pieces fill once it has stacked the experts."""
    return {piece.parameter: piece.shape if piece.expert is None else tensors[piece.tensor or ""] for piece in pieces}


def check_tensor_sets(what: str, expected: Shapes, found: Shapes, remedy: str) -> None:
    """Every expected tensor is there and every tensor there is expected, with the same shape.

    Raises:
        UserError: lists the differences, `what` and `remedy`.
    """
    missing = [f"missing: {name} {list(expected[name])}" for name in expected if name not in found]
    unknown = [f"not expected: {name} {list(found[name])}" for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = missing + unknown + reshaped
    if problems:
        listed = problems[:LISTED] + ([f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else [])
        raise UserError("\n  ".join([f"{what}: does not fit in {counted(len(problems), 'tensor')}; {remedy}", *listed]))


def half_split_rows(attention: LatentAttention, tensor: str) -> torch.Tensor | None:
    """Row order that turns a DeepSeek-V3 tensor with `rope_interleave` into kmem's half-split layout.

    Interleaved weights rotate rows (0, 1), (2, 3), ... of the rotary part together, half-split ones rows
    (0, d/2), (1, d/2 + 1), .... None for tensors without rotary rows.
    """
    rope = attention.qk_rope_head_dim
    even_then_odd = torch.cat([torch.arange(0, rope, 2), torch.arange(1, rope, 2)])
    local = tensor.split(".attention.")[-1]
    if local in ("q_proj.weight", "q_b_proj.weight"):
        head = torch.cat([torch.arange(attention.qk_nope_head_dim), attention.qk_nope_head_dim + even_then_odd])
        return (torch.arange(attention.num_heads)[:, None] * len(head) + head).flatten()
    if local == "kv_a_proj.weight":
        return torch.cat([torch.arange(attention.kv_lora_rank), attention.kv_lora_rank + even_then_odd])
    return None


def _own(tensor: str, shape: tuple[int, ...]) -> list[Piece]:
    return [Piece(tensor, shape, tensor, tensor, dtype=_dtype(tensor))]


def _table(layer: int, parts: Sequence[int], row_dim: int) -> list[Piece]:
    found, start = [], 0
    for part, rows in enumerate(parts):
        name = table_part_name(layer, part)
        found.append(Piece(name, (rows, row_dim), name, table_name(layer), start))
        start += rows
    return found


def _bank(layout: BankLayout, level: int, parts: Sequence[int]) -> list[Piece]:
    found, start = [], 0
    for part, rows in enumerate(parts):
        name = bank_table_part_name(level, part)
        shape = (rows, layout.row_values(level))
        found.append(Piece(name, shape, name, None, start, beside=_columns(layout, level)))
        start += rows
    return found


def _columns(layout: BankLayout, level: int) -> tuple[str, ...]:
    return tuple(layer_bank_name(layer, level) for layer in layout.layers)


def _dtype(tensor: str) -> torch.dtype | None:
    return torch.float32 if tensor.endswith(WIDE) else None


def _native(tensor: str, shape: tuple[int, ...]) -> list[Piece]:
    prefix, local = _place(tensor)
    names = LAYER_TABLE[local] if prefix else TABLE[local]
    if local not in STACKED:
        name = prefix + names[0]
        return [Piece(name, shape, name, tensor, dtype=_dtype(local))]
    rows = shape[1] // len(names)
    return [
        Piece(
            name=prefix + name.format(expert=expert),
            shape=(rows, *shape[2:]),
            parameter=prefix + STACKED[local],
            tensor=tensor,
            start=part * rows,
            expert=expert,
        )
        for expert in range(shape[0])
        for part, name in enumerate(names)
    ]


def _place(tensor: str) -> tuple[str, str]:
    """A kmem name as (its layer's prefix in a native folder, or nothing; its name within the layer)."""
    parts = tensor.split(".", 2)
    return (f"model.layers.{parts[1]}.", parts[2]) if parts[0] == "layers" else ("", tensor)


def _empty_shared_experts(model: ModelConfig) -> list[Piece]:
    """Transformers' DeepSeek-V3 always has shared experts; without any they are matrices of width 0."""
    assert model.moe
    if model.moe.num_shared_experts:
        return []
    projections = {
        "gate_proj": (0, model.hidden_size),
        "up_proj": (0, model.hidden_size),
        "down_proj": (model.hidden_size, 0),
    }
    return [
        Piece(name, shape, name, None)
        for layer in range(model.moe.first_dense_layers, model.num_layers)
        for projection, shape in projections.items()
        for name in [f"model.layers.{layer}.mlp.shared_experts.{projection}.weight"]
    ]
