"""Fetch the blocks of contexts from an exported bank whose levels are in host memory or on disk."""

import random
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from kmem.config import UserError
from kmem.data.safetensors_file import SafetensorsWriter
from kmem.model.bank_export import TREE_FOLDER, ExportedBank
from kmem.model.bank_inference import Fetch, InferenceBank, LevelFetch
from kmem.model.bank_kind import BankKind
from kmem.model.bank_layout import BankLayout, Part, bank_table_name
from kmem.model.bank_router import ContextRouter
from kmem.model.export_tables import WEIGHTS_FILE, map_tables
from kmem.model.exported_memory import exported_memory
from kmem.model.mapped_rows import MappedRows
from kmem.model.shape import Shape

Place = Literal["ram", "disk"]
Placement = Mapping[int, Place]
CONTEXT_TOKENS = 256
"""Length of the contexts that routing is timed with."""
SLICE_VALUES = 1 << 23


@dataclass(frozen=True)
class LevelTime:
    """Time to read the row of a context on one level, median over contexts."""

    level: int
    place: Place
    ms: float
    bytes: int


@dataclass(frozen=True)
class FetchTimes:
    """Times of one placement, medians over contexts."""

    placement: str
    levels: tuple[LevelTime, ...]
    """Each level, for contexts whose rows are all fetched."""
    all_ms: float
    """All levels together: a context in another level-1 cluster than the one before."""
    all_bytes: int
    deep_ms: float
    """A context in the same level-1 cluster but in another leaf: the level-1 row is already there."""
    deep_bytes: int


@dataclass(frozen=True)
class TimedBank:
    """The bank of an exported folder."""

    layout: BankLayout
    rows: dict[int, MappedRows]
    router: ContextRouter | None = None
    vocab_size: int = 0


def open_bank(folder: Path) -> TimedBank:
    """Open the bank of an exported folder; the rest of the model is not read.

    Raises:
        UserError: the folder is not an export, has no bank, or is damaged.
    """
    from kmem.data.tokenizer import load_tokenizer
    from kmem.hf.custom_code import register
    from kmem.hf.folder import read_config

    config = read_config(folder)
    model = config.get("model")
    if not isinstance(model, dict) or model.get("bank") is None:
        raise UserError(f"{folder / 'config.json'}: describes no model with a bank; name an export of one")

    def find(file: str) -> str | None:
        return str(folder / file) if (folder / file).is_file() else None

    register()  # otherwise Transformers warns about a tokenizer of an unknown model type
    try:
        exported = exported_memory(BankKind(), Shape(model), SimpleNamespace(**config))
        assert isinstance(exported, ExportedBank)
        described = exported.description
        router = described.router(folder / TREE_FOLDER, load_tokenizer(folder))
        return TimedBank(described.layout, map_tables(exported.tables, find), router, int(model["vocab_size"]))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def synthetic_bank(folder: Path, layers: int, width: int, ranks: tuple[int, ...], children: int) -> TimedBank:
    """A bank of random bf16 blocks of the kind ffn, in a file like an export's and without a tree.

    Args:
        folder: where the file is written.
        width: hidden size of the model.
        ranks: rank of the blocks on each level.
        children: of each node of the tree.
    """
    parts = tuple(Part(name, width, "normal") for name in ("gate", "up", "down"))
    layout = BankLayout("ffn", children, ranks, tuple(range(layers)), parts, 2.0, False, 0.02)
    shapes = {level: (layout.rows(level), layout.row_values(level)) for level in layout.levels}
    tensors = {bank_table_name(level): (shape, torch.bfloat16) for level, shape in shapes.items()}
    values = torch.randn(SLICE_VALUES).bfloat16()
    with SafetensorsWriter(folder / WEIGHTS_FILE, tensors) as writer:
        for name, ((rows, size), _) in tensors.items():
            left = rows * size
            while left:
                writer.write_values(name, values[:left])
                left -= min(left, len(values))
    mapped = {
        level: MappedRows.open(bank_table_name(level), size, [(folder / WEIGHTS_FILE, bank_table_name(level), rows)])
        for level, (rows, size) in shapes.items()
    }
    return TimedBank(layout, mapped)


def measure(bank: TimedBank, placement: Placement, contexts: int, seed: int, like: Tensor) -> FetchTimes:
    """Fetch for `contexts` contexts with random leaves of the whole tree, then of one level-1 cluster.

    Before each fetch the pages of levels on disk are dropped.

    Args:
        like: a tensor with the dtype and device that rows are copied to.
    """
    layout, draw = bank.layout, random.Random(seed)
    held = InferenceBank(layout, dict(bank.rows))
    for level, place in placement.items():
        if place == "ram":
            held.sources[level] = bank.rows[level](torch.arange(len(bank.rows[level]))).__getitem__
    below = layout.children ** (len(layout.ranks) - 1)  # leaves of a level-1 cluster

    def fetch(leaf: int) -> Fetch:
        for level, place in placement.items():
            for file in bank.rows[level].files if place == "disk" else ():
                file.drop_pages()
        return held.fetch(None, torch.tensor([leaf]), None, (), like)

    fresh, deep = [], []
    for _ in range(contexts):
        held.forget()
        fresh.append(fetch(draw.randrange(layout.children * below)))
    first = leaf = below * draw.randrange(layout.children)
    held.forget()
    fetch(leaf)
    for _ in range(contexts if below > 1 else 0):
        leaf = first + (leaf - first + draw.randrange(1, below)) % below  # another one of the cluster
        deep.append(fetch(leaf))
    return FetchTimes(
        ",".join(f"{level}={place}" for level, place in placement.items()),
        tuple(
            LevelTime(level, place, *_medians(read.levels[level] for read in fresh))
            for level, place in placement.items()
        ),
        *_medians(fresh),
        *_medians(deep),
    )


def route_ms(bank: TimedBank, contexts: int, seed: int) -> float | None:
    """Median time, in ms, to embed a context of CONTEXT_TOKENS tokens and descend the tree; None without a tree."""
    if bank.router is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    times = []
    for _ in range(contexts + 1):
        ids = torch.randint(bank.vocab_size, (CONTEXT_TOKENS,), generator=generator)
        began = time.perf_counter()
        bank.router.leaves([ids])
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times[1:])  # the first call also loads the embedder


def bytes_needed(bank: TimedBank, placement: Placement) -> int:
    """Bytes of the levels that are placed in host memory."""
    held = [bank.rows[level] for level, place in placement.items() if place == "ram"]
    return sum(len(rows) * rows.dim * rows.dtype.itemsize for rows in held)


def _medians(reads: Iterable[Fetch | LevelFetch]) -> tuple[float, int]:
    """(milliseconds, bytes), 0 if nothing was read."""
    ms, sizes = zip(*[(1e3 * read.seconds, read.bytes) for read in reads] or [(0.0, 0)], strict=True)
    return statistics.median(ms), int(statistics.median(sizes))
