"""The n-gram memory of a Hugging Face folder: what its config.json says of the tables, and where their rows lie."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engram_memory import table_name, table_part_name, table_rows
from .mapped_rows import MappedRows
from .ngram_addresses import NgramAddressing
from .shape import Shape

COMPRESSION = "token_compression"
"""Name of the tensor that maps token ids to compressed ids, int64 [V]."""
TABLES = r"^layers\.\d+\.engram\.table\."
"""Beginning of the names of the tensors that hold rows, as a pattern."""
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class MemoryDescription:
    """Addressing and tables of a model."""

    addressing: NgramAddressing
    parts: Mapping[int, list[int]]
    """Layer -> rows of each tensor of its table, in the order of the rows."""
    row_dim: int

    @classmethod
    def read(
        cls, shape: Shape, manifest: Mapping[str, Any] | None, parts: Mapping[str, list[int]]
    ) -> "MemoryDescription":
        """The description of a model with n-gram memory; what config.json holds.

        Raises:
            ValueError: names the field of config.json that is missing or contradicts `model`.
        """
        if manifest is None:
            raise ValueError(
                "config.json: engram_addressing is missing; without it the rows of model.engram mean nothing"
            )
        try:
            addressing = NgramAddressing.from_manifest(manifest)
        except ValueError as error:
            raise ValueError(f"config.json: engram_addressing: {error}") from error
        expected = table_rows(shape)
        found = {layer: addressing.padded_rows(table) for table, layer in enumerate(addressing.layers)}
        vocabulary = addressing.raw_vocab_size
        if found != expected or vocabulary != shape.vocab_size:
            raise ValueError(
                f"config.json: engram_addressing has tables of {found} rows for {vocabulary} token ids, `model` of "
                f"{expected} for {shape.vocab_size}"
            )
        cut = {layer: list(parts.get(str(layer), [rows])) for layer, rows in expected.items()}
        wrong = [layer for layer, rows in cut.items() if sum(rows) != expected[layer] or min(rows) < 1]
        if wrong:
            raise ValueError(
                f"config.json: engram_parts of layer {wrong[0]} do not add up to {expected[wrong[0]]} rows"
            )
        return cls(addressing, cut, shape.memory.row_dim)

    @property
    def compressed(self) -> bool:
        """Whether tokens are addressed by compressed ids."""
        return self.addressing.compressed_vocab_size is not None

    def tensors(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of the tensors that hold the rows."""
        return {
            table_part_name(layer, part): (rows, self.row_dim)
            for layer, parts in self.parts.items()
            for part, rows in enumerate(parts)
        }

    def mapped(self, find: Callable[[str], str | None]) -> dict[int, MappedRows]:
        """Every layer's rows in the folder's weight files.

        Args:
            find: path of a file of the folder, None where there is none.

        Raises:
            ValueError: names the file or tensor that is missing or damaged.
        """
        places = weight_files(self.tensors(), find)

        def ranges(layer: int) -> Iterator[tuple[str, str, int]]:
            for part, rows in enumerate(self.parts[layer]):
                name = table_part_name(layer, part)
                yield places[name], name, rows

        return {layer: MappedRows.open(table_name(layer), self.row_dim, ranges(layer)) for layer in self.parts}


def weight_files(tensors: Iterable[str], find: Callable[[str], str | None]) -> dict[str, str]:
    """Tensor -> path of the folder's weight file that holds it.

    Args:
        find: path of a file of the folder, None where there is none.

    Raises:
        ValueError: names the file that is missing or damaged.
    """
    names = list(tensors)
    index, single = find(INDEX_FILE), find(WEIGHTS_FILE)
    if index is None and single is None:
        raise ValueError(f"neither {INDEX_FILE} nor {WEIGHTS_FILE} is there: rows are mapped from safetensors files")
    if index is None:
        assert single is not None
        return dict.fromkeys(names, single)
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {name: weight_map[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: names no file for {error}; export the model again") from error
    found = {file: find(file) for file in set(files.values())}
    absent = sorted(file for file, path in found.items() if path is None)
    if absent:
        raise ValueError(f"{index}: names {absent[0]}, which is not there; fetch the folder again")
    return {name: found[file] or "" for name, file in files.items()}
