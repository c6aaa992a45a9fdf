"""Which tensor of a Hugging Face folder holds which rows of which kmem tensor.

One map serves every native architecture in both directions. On disk a folder has one tensor per expert and projection
(Transformers stacks them while loading), so a stack of experts is cut into pieces; any other tensor is one piece. A
piece is always a range of rows, so a model may be larger than host memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.config import LatentAttention, ModelConfig, UserError
from kmem.hf.architectures import KMEM
from kmem.hf.native import Architecture
from kmem.model.memory_kind import ExportedRows
from kmem.model.memory_kinds import kinds_of
from kmem.model.parameter_counts import tensor_shapes
from kmem.wording import counted

LISTED = 20  # differences named in an error
SLICE_BYTES = 32 << 20  # rows of a large tensor are copied in parts of this size

NATIVE_NAMES = {
    "embedding": "embed_tokens",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "q_a_norm": "q_a_layernorm",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "feed_forward": "mlp",
    "router": "gate",
    "selection_bias": "e_score_correction_bias",
}
"""Part of a kmem name -> the same part of a name in a native folder, where they differ."""
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stack of a layer's experts, which Transformers has too when it has loaded a folder -> the projections that share an
expert's rows evenly. On disk each expert has a tensor for each."""
WIDE = ".selection_bias"
"""Suffix of the names of tensors that stay in fp32 whatever the folder's dtype: the bias is updated in steps that bf16
cannot resolve."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Piece:
    """One tensor of a folder: rows [start, stop) of a kmem tensor, or of one expert of a stack."""

    name: str
    """The piece's name on disk."""
    shape: tuple[int, ...]
    """The piece's shape."""
    parameter: str
    """The parameter of the Transformers model that the piece becomes, alone or as a part."""
    dtype: torch.dtype
    tensors: tuple[str, ...] = ()
    """kmem's tensor; several tensors if their rows stand side by side in the piece's rows: the blocks of a bank's
    layers. None for a piece that is no weight (the compression of the vocabulary, or a tensor without elements that the
    architecture insists on)."""
    start: int = 0
    expert: int | None = None
    """Index into the stack's first dimension; None for a tensor that is not a stack."""

    @property
    def stop(self) -> int:
        """The first row after the piece's rows."""
        return self.start + self.shape[0]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


TableParts = Mapping[str, Mapping[int, Sequence[int]]]
"""Kind of memory -> key of an exported table (`ModelKind.exported_rows`) -> number of rows in each tensor that holds a
part of the table."""


def folder_pieces(
    model: ModelConfig,
    architecture: Architecture,
    parts: TableParts | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Piece]:
    """The tensors of a folder of this architecture, in kmem's order; together they hold every row once.

    Args:
        parts: how tables are split into tensors; a table that is not named is one tensor.
        dtype: the folder's dtype.
    """
    shape, tensors = model.shape, tensor_shapes(model.shape)
    kinds = kinds_of(shape)
    tables = {name for kind in kinds for name in kind.tables(shape)}
    pieces: list[Piece] = []
    for tensor, size in tensors.items():
        held = torch.float32 if tensor.endswith(WIDE) else dtype
        if architecture is not KMEM:  # these have no tables
            pieces += _native(tensor, tuple(size), held, architecture)
        elif tensor not in tables:
            pieces.append(Piece(tensor, tuple(size), tensor, held, (tensor,)))
    for kind in kinds:
        for key, table in kind.exported_rows(shape).items():
            pieces += _table(table, (parts or {}).get(kind.name, {}).get(key, [table.rows]), dtype)
    for kind in kinds:
        for name, length in kind.exported_tensors(shape).items():
            pieces.append(Piece(name, (length,), name, torch.int64))
    if architecture.empty_shared_experts:
        pieces += _empty_shared_experts(model, dtype)
    assert len({piece.name for piece in pieces}) == len(pieces)
    kept = sum(prod(piece.shape) for piece in pieces if piece.tensors)
    assert kept == sum(map(prod, tensors.values()))
    return pieces


def table_parts(model: ModelConfig, itemsize: int, max_bytes: int) -> dict[str, dict[int, list[int]]]:
    """Number of rows in each tensor that holds a part of a table, as `TableParts`.

    The parts of a table are nearly equal, and at most `max_bytes` long with values of `itemsize` bytes. A single row is
    never cut.
    """
    return {
        kind.name: {
            key: _near_equal(table.rows, table.width * itemsize, max_bytes)
            for key, table in kind.exported_rows(model.shape).items()
        }
        for kind in kinds_of(model.shape)
    }


def _near_equal(rows: int, row_bytes: int, max_bytes: int) -> list[int]:
    count = -(-rows // max(1, max_bytes // row_bytes))
    return [rows // count + (part < rows % count) for part in range(count)]


def parameters(pieces: Iterable[Piece], tensors: Shapes) -> dict[str, Sequence[int]]:
    """Name -> shape of the Transformers parameters that these pieces fill once the experts are stacked."""
    return {piece.parameter: piece.shape if piece.expert is None else tensors[piece.tensors[0]] for piece in pieces}


def row_slices(start: int, stop: int, row_values: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the parts of rows [start, stop) that are copied at a time: SLICE_BYTES of fp32 at most, or one
    row."""
    rows = max(1, SLICE_BYTES // max(1, row_values * torch.float32.itemsize))
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)


def reordered(
    read: Callable[[int, int], torch.Tensor], order: torch.Tensor | None, first: int, last: int
) -> torch.Tensor:
    """Rows order[first:last] of a tensor, or [first, last) without an order. `read` gives a range of its rows.

    The orders of rotary rows stay within a head, so hardly more is read than returned.
    """
    if order is None:
        return read(first, last)
    rows = order[first:last]
    low = int(rows.min())
    return read(low, int(rows.max()) + 1)[rows - low]


def check_tensor_sets(what: str, expected: Shapes, found: Shapes, remedy: str) -> None:
    """Check that `found` has exactly the expected tensors, with the expected shapes.

    Args:
        what: what holds the tensors, for the message.
        remedy: what to do about a difference, for the message.

    Raises:
        UserError: names `what` and `remedy` and lists the differences.
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
        raise UserError("\n  ".join([f"{what}: {counted(len(problems), 'tensor')} do not match; {remedy}", *listed]))


def check_own_tensors(reader: CheckpointReader) -> None:
    """`check_tensor_sets` of a checkpoint against its own model section."""
    check_tensor_sets(
        str(reader.folder),
        expected=tensor_shapes(reader.config.model.shape),
        found={name: tuple(tensor.shape) for name, tensor in reader.tensors.items()},
        remedy="it was not saved by a run of its own model section",
    )


def half_split_rows(attention: LatentAttention, tensor: str) -> torch.Tensor | None:
    """Row order that turns an interleaved tensor of DeepSeek into kmem's half-split layout; int64 [rows].

    Interleaved weights rotate the pairs of rows (0, 1), (2, 3), ... of the rotary part; half-split weights rotate the
    pairs (0, d/2), (1, d/2 + 1), .... None for tensors without rotary rows.
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


def interleaved_rows(attention: LatentAttention, tensor: str) -> torch.Tensor | None:
    """The inverse of `half_split_rows`."""
    rows = half_split_rows(attention, tensor)
    return None if rows is None else rows.argsort()


def _table(table: ExportedRows, parts: Sequence[int], dtype: torch.dtype) -> list[Piece]:
    pieces, start = [], 0
    for number, rows in enumerate(parts):
        name = table.part(number)
        pieces.append(Piece(name, (rows, table.width), name, dtype, table.columns, start))
        start += rows
    return pieces


def _native(tensor: str, shape: tuple[int, ...], dtype: torch.dtype, architecture: Architecture) -> list[Piece]:
    name = ".".join(NATIVE_NAMES.get(part, part) for part in tensor.split("."))
    if not name.startswith("lm_head."):
        name = f"model.{name}"
    name = _replaced(name, architecture.parameter_names)
    layer, experts, stack = name.partition(".experts.")
    if not experts:
        return [Piece(_replaced(name, architecture.disk_names), shape, name, dtype, (tensor,))]
    projections = STACKED[stack]
    rows = shape[1] // len(projections)
    return [
        Piece(
            name=_replaced(f"{layer}.experts.{expert}.{projection}.weight", architecture.disk_names),
            shape=(rows, *shape[2:]),
            parameter=name,
            dtype=dtype,
            tensors=(tensor,),
            start=part * rows,
            expert=expert,
        )
        for expert in range(shape[0])
        for part, projection in enumerate(projections)
    ]


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _empty_shared_experts(model: ModelConfig, dtype: torch.dtype) -> list[Piece]:
    """Transformers' DeepSeek always has shared experts; for a model without any they are matrices of width 0."""
    assert model.moe
    if model.moe.num_shared_experts:
        return []
    into, out_of = (0, model.hidden_size), (model.hidden_size, 0)
    return [
        Piece(name, shape, name, dtype)
        for layer in range(model.moe.first_dense_layers, model.num_layers)
        for projection, shape in (("gate_proj", into), ("up_proj", into), ("down_proj", out_of))
        for name in [f"model.layers.{layer}.mlp.shared_experts.{projection}.weight"]
    ]
