"""Tables in a Hugging Face folder: each is cut into tensors of consecutive rows, found in its weight files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .mapped_rows import MappedRows

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ExportedTable:
    """A table of a folder."""

    name: str
    width: int
    """Values of a row."""
    parts: Mapping[str, int]
    """Name -> rows of each tensor, in the order of the rows."""

    @classmethod
    def cut(cls, name: str, width: int, rows: Sequence[int], part_name: Callable[[int], str]) -> "ExportedTable":
        """A table whose tensors have so many rows, and are named by their numbers."""
        return cls(name, width, {part_name(part): count for part, count in enumerate(rows)})

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of each tensor."""
        return {name: (rows, self.width) for name, rows in self.parts.items()}


def read_parts(recorded: Sequence[int] | None, rows: int, field: str, table: str) -> list[int]:
    """Rows of each tensor of a table, as config.json has them; one tensor where it says nothing.

    Args:
        field: of config.json.
        table: which of the field's tables, for the message.

    Raises:
        ValueError: they are not those of the model's table.
    """
    parts = [rows] if recorded is None else list(recorded)
    if sum(parts) != rows or min(parts) < 1:
        raise ValueError(
            f"config.json: {field} of {table} do not add up to the {rows} rows of `model`; export the model again"
        )
    return parts


def map_tables(tables: Mapping[int, ExportedTable], find: Callable[[str], str | None]) -> dict[int, MappedRows]:
    """Every table's rows in the folder's weight files.

    Args:
        find: path of a file of the folder, None where there is none.

    Raises:
        ValueError: names the file or tensor that is missing or damaged.
    """
    places = weight_files([name for table in tables.values() for name in table.parts], find)
    return {
        key: MappedRows.open(
            table.name, table.width, ((places[name], name, rows) for name, rows in table.parts.items())
        )
        for key, table in tables.items()
    }


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
