"""Tables in a Hugging Face folder. Each is cut into tensors of consecutive rows, which lie in the weight files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .mapped_rows import MappedRows
from .memory_kind import ExportedRows

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

# Shape letters: R_i rows of part i of a table, D values of a row.

RowSource = Callable[[Tensor], Tensor]
"""Row ids int64 [..] -> rows [.., D] on the device of the ids."""


@dataclass(frozen=True)
class ExportedTable:
    """A table of a folder."""

    name: str
    width: int
    """Number of values per row."""
    parts: Mapping[str, int]
    """Name of each tensor -> its number of rows, in the order of the rows."""

    @classmethod
    def recorded(cls, table: ExportedRows, counts: Sequence[int] | None, field: str) -> "ExportedTable":
        """A table of the model, cut into tensors as config.json records it; one tensor if it records nothing.

        Args:
            table: name, rows and width.
            counts: numbers of rows of the tensors, from config.json.
            field: field of config.json, for the message.

        Raises:
            ValueError: the recorded numbers do not add up to the table's rows.
        """
        parts = [table.rows] if counts is None else list(counts)
        if sum(parts) != table.rows or min(parts) < 1:
            raise ValueError(
                f"config.json: {field} of {table.name} do not add up to the {table.rows} rows of `model`; export the "
                "model again"
            )
        return cls(table.name, table.width, {table.part(number): rows for number, rows in enumerate(parts)})


def map_tables(tables: Mapping[int, ExportedTable], find: Callable[[str], str | None]) -> dict[int, MappedRows]:
    """Map the rows of every table in the folder's weight files.

    Args:
        find: gives the path of a file of the folder, None if it does not exist.

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
        find: gives the path of a file of the folder, None if it does not exist.

    Raises:
        ValueError: names the file that is missing or damaged.
    """
    names = list(tensors)
    index, single = find(INDEX_FILE), find(WEIGHTS_FILE)
    if index is None and single is None:
        raise ValueError(f"neither {INDEX_FILE} nor {WEIGHTS_FILE} exists: rows are mapped from safetensors files")
    if index is None:
        assert single is not None
        return dict.fromkeys(names, single)
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {name: weight_map[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: names no file for {error}; export the model again") from error
    paths = {file: find(file) for file in set(files.values())}
    missing = sorted(file for file, path in paths.items() if path is None)
    if missing:
        raise ValueError(f"{index}: names {missing[0]}, which does not exist; fetch the folder again")
    return {name: paths[file] or "" for name, file in files.items()}


class RowParts(nn.ParameterList):
    """Parameters of consecutive rows [R_i, D]; a call looks rows up.

    It is called, and not only read, because hooks that move weights in and out of memory (`device_map`) see only calls
    of the module that owns them.
    """

    __call__ = nn.Module.__call__  # torch's list refuses calls

    def forward(self, rows: Tensor) -> Tensor:
        """Row ids int64 [..] -> rows [.., D]."""
        if len(self) == 1:
            return self[0][rows]
        flat = rows.flatten()
        out, start = self[0].new_empty(len(flat), self[0].shape[1]), 0
        for part in self:
            places = ((flat >= start) & (flat < start + len(part))).nonzero().squeeze(1)
            out.index_copy_(0, places, part[flat[places] - start])
            start += len(part)
        return out.view(*rows.shape, -1)


class RowTable(nn.Module):
    """A table in device memory."""

    def __init__(self, parts: list[int], dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.parts = RowParts(nn.Parameter(torch.empty(rows, dim, dtype=dtype)) for rows in parts)

    def forward(self, rows: Tensor) -> Tensor:
        """Row ids int64 [..] -> rows [.., D]."""
        return self.parts(rows)
