"""Rows of a checkpoint's engram: what they hold, which rows the n-grams of a text read, and erasing them.

Rows are addressed by hashes: a text leads to its rows, but a row leads to no text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.commit import WEIGHT
from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.rewriting import rewrite_run
from kmem.checkpoint.storage import TORCH_DTYPES
from kmem.config import UserError
from kmem.data.engram_addresses import model_addresses
from kmem.data.progress import Progress
from kmem.data.tokenizer import load_tokenizer
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.wording import counted

# Shape letters: T tokens, K rows per token and layer (heads of the first order, then of the next), D values of a row.

SLICE_BYTES = 32 << 20


@dataclass(frozen=True)
class TableFigures:
    """Figures of a layer's rows, as they are stored."""

    layer: int
    rows: int
    dim: int
    bytes: int
    updated: int | None
    """Rows that training has moved, judged by their optimizer state; None if the checkpoint has no such state."""
    mean_norm: float
    """Mean 2-norm of a row."""
    largest_norm: float


@dataclass(frozen=True)
class Ngram:
    """An n-gram that ends at a token of a text, and the rows of one layer for it."""

    layer: int
    position: int
    """Position of its last token, from 0."""
    order: int
    text: str
    """Text of those of its tokens that lie inside the text."""
    missing: int
    """Tokens that would lie before the text; the pad id replaces them."""
    rows: tuple[int, ...]
    """The row of each head."""
    norms: tuple[float, ...]
    updated: tuple[bool, ...] | None
    """Whether training has moved each row; None as in `TableFigures`."""


def checkpoint_addresses(reader: CheckpointReader) -> EngramAddresses:
    """The addresses that a checkpoint's tables were trained with: which n-gram reads which rows.

    Raises:
        CheckpointError: it has no engram or holds no addressing, or its tokenizer is missing or gives another one.
    """
    if reader.config.model.engram is None:
        raise CheckpointError(f"{reader.folder}: has no engram (model.engram)")
    if reader.addressing is None:
        raise CheckpointError(f"{reader.folder}: has no addressing of model.engram, so its rows cannot be found")
    if not reader.tokenizer_path.is_dir():
        raise CheckpointError(
            f"{reader.tokenizer_path}: no tokenizer here, and rows are addressed by its ids; copy the data's"
        )
    addresses = model_addresses(reader.config.model, reader.tokenizer_path)
    check_addressing(reader.folder, reader.addressing, addresses)
    return addresses


def table_figures(reader: CheckpointReader, layers: Sequence[int]) -> Iterator[TableFigures]:
    """Figures of each layer's table, read once, a slice of its rows at a time."""
    stored = {layer: [WEIGHT + table_name(layer), *_moments(reader, layer)] for layer in layers}
    total = sum(reader.commit.tensors[key].size for keys in stored.values() for key in keys)
    with Progress("reading rows", total) as bar:
        for layer, (weight, *moments) in stored.items():
            table = reader.tensors[weight.removeprefix(WEIGHT)]
            rows, dim = table.shape
            updated, norms, largest = 0, 0.0, 0.0
            step = max(1, SLICE_BYTES // (dim * torch.float32.itemsize))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                of_slice = _rows(reader, weight, start, stop).double().norm(dim=1)
                norms, largest = norms + float(of_slice.sum()), max(largest, float(of_slice.max()))
                moved = torch.zeros(stop - start, dtype=torch.bool)
                for key in moments:
                    moved |= (_rows(reader, key, start, stop) != 0).any(dim=1)
                updated += int(moved.sum())
                bar.advance(sum((stop - start) * (reader.row_width(key) or 0) for key in (weight, *moments)))
            yield TableFigures(layer, rows, dim, table.nbytes, updated if moments else None, norms / rows, largest)


def text_ngrams(reader: CheckpointReader, text: str, layers: Sequence[int]) -> Iterator[Ngram]:
    """The n-grams that end at each token of a text. The text is read as the beginning of a document.

    Raises:
        UserError: the text has no token.
    """
    addresses, tokenizer = checkpoint_addresses(reader), load_tokenizer(reader.tokenizer_path)
    ids, orders = _tokens(tokenizer, text, "--text"), addresses.addressing.orders
    for layer in layers:
        table, kinds = reader.map_rows(table_name(layer)), [key.partition("/")[0] for key in _moments(reader, layer)]
        moments = [reader.map_rows(table_name(layer), f"{kind}/") for kind in kinds]
        for position, rows_K in enumerate(addresses.row_ids(layer, torch.tensor([ids]))[0]):
            norms_K = table(rows_K).double().norm(dim=1)
            moved_K = (
                torch.stack([(moment(rows_K) != 0).any(dim=1) for moment in moments]).any(dim=0) if moments else None
            )
            heads = addresses.addressing.heads
            for number, order in enumerate(orders):
                of_order = slice(number * heads, (number + 1) * heads)
                first = position + 1 - order
                yield Ngram(
                    layer,
                    position,
                    order,
                    tokenizer.decode(ids[max(0, first) : position + 1]),
                    max(0, -first),
                    tuple(rows_K[of_order].tolist()),
                    tuple(norms_K[of_order].tolist()),
                    None if moved_K is None else tuple(moved_K[of_order].tolist()),
                )


def erase(reader: CheckpointReader, out: Path, texts: Mapping[str, str]) -> tuple[Path, dict[int, int]]:
    """Write a checkpoint in which some rows are zeros, without optimizer state: the rows that are read by n-grams which
    lie wholly inside the texts. Everything else is equal to the bit.

    Args:
        texts: text -> where the user gave it, for errors.

    Returns:
        The folder of the new checkpoint, and layer -> number of rows that are zeros now.

    Raises:
        UserError: a text that is shorter than the shortest n-grams, or a folder that cannot be written.
    """
    addresses, tokenizer = checkpoint_addresses(reader), load_tokenizer(reader.tokenizer_path)
    reader.check_whole()
    orders, heads = addresses.addressing.orders, addresses.addressing.heads
    chosen = {
        layer: torch.zeros(reader.tensors[table_name(layer)].shape[0], dtype=torch.bool) for layer in addresses.layers
    }
    for text, source in texts.items():
        ids = _tokens(tokenizer, text, source)
        if len(ids) < orders[0]:
            raise UserError(
                f"{source}: {text!r} is {counted(len(ids), 'token')}, and the shortest n-grams of this "
                f"model have {orders[0]}; give a longer text"
            )
        for layer, mask in chosen.items():
            rows_TK = addresses.row_ids(layer, torch.tensor([ids]))[0]
            for number, order in enumerate(orders):
                mask[rows_TK[order - 1 :, number * heads : (number + 1) * heads]] = True
    of_name = {table_name(layer): mask for layer, mask in chosen.items()}

    def edit(key: str, start: int, values: Tensor) -> Tensor:
        mask = of_name.get(key.partition("/")[2])
        width = None if mask is None else reader.row_width(key)
        if mask is None or width is None:
            return values
        first, last = start // width, -(-(start + len(values)) // width)
        begun = start - first * width
        return values.masked_fill(mask[first:last].repeat_interleave(width)[begun : begun + len(values)], 0)

    note = f"erased the n-gram rows of {counted(len(texts), 'text')}"
    return rewrite_run(reader, out, note, edit), {layer: int(mask.sum()) for layer, mask in chosen.items()}


def _moments(reader: CheckpointReader, layer: int) -> list[str]:
    """Names of the optimizer state that is stored for each row of a layer, without counts of steps."""
    return [
        key
        for key, stored in reader.commit.tensors.items()
        if key.partition("/")[2] == table_name(layer)
        and not key.startswith(WEIGHT)
        and TORCH_DTYPES[stored.dtype].is_floating_point
        and reader.row_width(key) is not None
    ]


def _rows(reader: CheckpointReader, key: str, start: int, stop: int) -> Tensor:
    width = reader.row_width(key)
    assert width is not None
    return reader.read_stored(key, start * width, stop * width).view(stop - start, width)


def _tokens(tokenizer: Any, text: str, source: str) -> list[int]:
    """Token ids, as text of a document: the spelling of a special token is ordinary characters."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not ids:
        raise UserError(f"{source}: {text!r} has no token; give a longer text")
    return ids
