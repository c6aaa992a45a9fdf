"""One kind of memory in a whole model in one process: its tables, its control, and what its layers read. Ships beside
exported weights.

Training reads rows from sharded tables instead (`kmem.tables`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from .export_tables import ExportedTable, RowSource, RowTable, map_tables
from .memory_kind import OFF, MemoryModule, ModelKind
from .shape import Shape

# Shape letters: B sequences, T new tokens, H hidden size.


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens of a forward pass, for the memories that read them."""

    like: Tensor
    """A tensor [B, T, ..] of the model's dtype, on its device."""
    input_ids: Tensor | None
    """int64 [B, T]; None if the caller gave embeddings instead."""
    present: Tensor | None = None
    """[B, T], 0 where a token is padding; None: no padding."""
    document_ids: Tensor | None = None
    """int64 [B, T]; None: each sequence is one document."""
    addresses: Tensor | None = None
    """The leaf of each sequence [B] or token [B, T], if the caller gave it."""
    continued: bool = False
    """Whether these tokens follow others in a cache."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of `ModelKind.exported_tensors`, by name."""


class SequenceState(Protocol):
    """What a memory keeps of a batch of sequences between the forward passes of a generation."""

    @property
    def batch(self) -> int:
        """Number of sequences."""

    def record(self, on: bool) -> None:
        """Set whether to record what `crop` needs to remove later tokens."""

    def crop(self, tokens: int) -> None:
        """Remove the last `tokens` tokens."""

    def reorder(self, order: Tensor) -> None:
        """Select the sequences `order` int64 [B']; a sequence may occur several times."""


class Carried:
    """The place of a memory's state in a key-value cache."""

    def __init__(self) -> None:
        self.state: Any = None
        """A `SequenceState`, made by the memory in the first forward pass."""
        self.recording = False
        """Whether the state must record what `crop` needs."""


def exported_memory(kind: ModelKind, shape: Shape, config: Any) -> "ExportedMemory":
    """The memory that a model's configuration describes.

    Args:
        config: has the fields of config.json as attributes.

    Raises:
        ValueError: as `ExportedMemory`.
    """
    fields = {name: getattr(config, f"{kind.name}_{name}", None) for name in ("parts", *kind.exported_fields)}
    return kind.exported(kind, shape, fields)


def modules_of(layers: nn.ModuleList, kind: ModelKind, shape: Shape) -> dict[int, MemoryModule]:
    """Layer -> its module of this kind, from the layers of a `Decoder`."""
    modules = {layer: layers[layer].get_submodule(kind.name) for layer in kind.layers(shape)}
    return {layer: module for layer, module in modules.items() if isinstance(module, MemoryModule)}


class ExportedMemory:
    """One kind of memory of a model.

    Args:
        kind: its kind, which the model has.
        fields: the fields of config.json that begin with the kind's name, without that beginning: `parts`, and those in
            `ModelKind.exported_fields`.

    Raises:
        ValueError: names the field of config.json that is missing or contradicts `model`.
    """

    tables_kept = "device"
    """Where tables are kept unless the user says it: device or mmap."""
    needs_token_ids = False
    """Whether it reads token ids, so that the model cannot begin with embeddings, and its vocabulary is fixed."""
    keeps_state = False
    """Whether it keeps a `SequenceState` in the cache."""

    def __init__(self, kind: ModelKind, shape: Shape, fields: Mapping[str, Any]) -> None:
        self.kind, self.shape = kind, shape
        self.sources: dict[int, RowSource] = {}
        """Key of each table -> function that reads its rows."""
        self._control = kind.trained_control(shape)
        recorded = fields.get("parts") or {}
        self.tables = {
            key: ExportedTable.recorded(table, recorded.get(str(key)), f"{kind.name}_parts")
            for key, table in kind.exported_rows(shape).items()
        }
        """Key (`ModelKind.exported_rows`) -> table."""

    @property
    def parts(self) -> dict[int, list[int]]:
        """Key -> number of rows of each tensor of the table."""
        return {key: list(table.parts.values()) for key, table in self.tables.items()}

    @property
    def control(self) -> str:
        """One of `ModelKind.controls`. Can be set.

        Raises:
            ValueError: this model has no such control.
        """
        return self._control

    @control.setter
    def control(self, value: str) -> None:
        self.kind.check_control(self.shape, value)
        self._control = value

    def attach(self, modules: Mapping[int, MemoryModule]) -> None:
        """Called once with the layer's modules of this memory."""

    def hold(self) -> Iterator[tuple[str, RowTable]]:
        """(name, table) of every table, made as parameters without values; rows are read from them."""
        for key, table in self.tables.items():
            self.sources[key] = held = RowTable(list(table.parts.values()), table.width)
            yield table.name, held

    def use(self, sources: Mapping[int, RowSource]) -> None:
        """Read rows from these functions, one for each table."""
        self.sources.clear()
        self.sources.update(sources)

    def loaded(self, folder: Any, config: Any, mapped: bool) -> None:
        """Called when the model has been loaded.

        Args:
            folder: the `PretrainedFolder` that it comes from.
            config: the model's configuration.
            mapped: whether the tables stay in the folder's files.

        Raises:
            ValueError: names the file that is missing or damaged.
        """
        if mapped:
            self.use(map_tables(self.tables, folder.find))

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Check the loaded tensors of `ModelKind.exported_tensors`.

        Raises:
            ValueError: they are not those that the tables were trained with.
        """

    def inputs(self, tokens: ForwardTokens, carried: Carried | None = None) -> dict[int, Any]:
        """Layer -> what its memory reads for these tokens.

        Args:
            carried: the memory's place in the cache; None without a cache, or if the cache holds tokens that this
                memory has not read.

        Raises:
            ValueError: an argument is missing; names it.
        """
        if self.control == "off":
            return dict.fromkeys(self.kind.layers(self.shape), OFF)
        if self.sources.keys() != self.tables.keys():
            raise ValueError('tables="mmap": the tables stay in the weight files; load the model with from_pretrained')
        return self.read(tokens, carried)

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, Any]:
        """As `inputs`, when the memory is not switched off."""
        raise NotImplementedError

    def state(self, tokens: ForwardTokens, carried: Carried | None, start: Callable[[], SequenceState]) -> Any:
        """The state before these tokens, or None without a cache; `start` makes the state of new sequences.

        Raises:
            ValueError: the cache holds tokens that this memory has not read, or another number of sequences.
        """
        if carried is None:
            if tokens.continued:
                raise ValueError(
                    f"past_key_values holds tokens that this model's {self.kind.name} has not read: continue a cache "
                    "that this model filled"
                )
            return None
        if carried.state is None:
            carried.state = start()
        if carried.state.batch != len(tokens.like):
            raise ValueError(f"the cache holds {carried.state.batch} sequences, but {len(tokens.like)} are given")
        carried.state.record(carried.recording)
        return carried.state

    def initialise_rows_(self, part: Tensor, key: int, start: int, seed: int) -> None:
        """Set the initial values of the rows [start, start + len(part)) of a table."""
        nn.init.normal_(part, std=self.kind.init_std(self.shape))

    def saved(self, folder: Path) -> None:
        """Called when the weights have been saved to a folder, to save what belongs beside them."""

    @property
    def is_saved(self) -> bool:
        """Whether the tables are parameters, which are saved with the model."""
        return bool(self.sources) and all(isinstance(rows, RowTable) for rows in self.sources.values())
