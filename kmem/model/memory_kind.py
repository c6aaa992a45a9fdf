"""The seam between a model and its memories.

A kind of memory is known by the name of its section in the model's configuration (`model.engram`, `model.bank`). This
file has what a kind says about models (`ModelKind`) and what it computes in a layer (`MemoryModule`). A layer calls its
memories at named places and knows none of them by name:

    enter         the entrance of the layer, on the residual stream; of layer 0, this is the input embedding
    project       every projection of the attention and of a dense feed-forward
    attend        the queries of the attention
    feed          the feed-forward's input and output
    leave         the end of the layer, on the residual stream

The training half of a kind has the same name in `kmem/parallel/memory_kinds.py`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .shape import Shape

# Shape letters: B sequences, T tokens, H hidden size, M branches of the residual stream.


class MemoryModule(nn.Module):
    """What a kind computes in one layer. A place that a kind does not use leaves the layer as it is.

    `read` is what the kind looked up in this layer for the running tokens. Its type is the kind's own.
    """

    def enter(self, hidden: Tensor, read: Any) -> Tensor:
        """The residual stream [B, T, H] or [B, T, M, H] at the entrance of the layer."""
        return hidden

    def project(self, name: str, x: Tensor, out: Tensor, read: Any) -> Tensor:
        """The output [B, T, ..] of the projection `name` (such as "q_proj") of x [B, T, ..]."""
        return out

    def attend(self, query: Tensor, read: Any) -> Tensor | None:
        """What is added to the output of the attention's heads [B, T, h * e'], for queries [B, T, h, e] that are
        normed and not rotated; None for nothing."""
        return None

    def feed(self, x: Tensor, out: Tensor, read: Any) -> Tensor:
        """The feed-forward's output [B, T, H] for its normed input x [B, T, H]."""
        return out

    def leave(self, hidden: Tensor, read: Any) -> Tensor:
        """The residual stream at the end of the layer."""
        return hidden


OFF = object()
"""In place of what a kind reads: the layer goes without this memory. It is a control."""


class LayerMemories:
    """The memories of one layer with what they read for the running tokens."""

    def __init__(self, modules: Mapping[str, MemoryModule], reads: Mapping[str, Any]) -> None:
        assert modules.keys() == reads.keys(), (
            f"a layer with the memories {list(modules)} was given what {list(reads)} read"
        )
        self._pairs = [(module, reads[kind]) for kind, module in modules.items() if reads[kind] is not OFF]

    def enter(self, hidden: Tensor) -> Tensor:
        for module, read in self._pairs:
            hidden = module.enter(hidden, read)
        return hidden

    def project(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        for module, read in self._pairs:
            out = module.project(name, x, out, read)
        return out

    def attend(self, query: Tensor, out: Tensor) -> Tensor:
        """The output of the heads [B, T, h * e'] with what the memories add."""
        for module, read in self._pairs:
            found = module.attend(query, read)
            out = out if found is None else out + found
        return out

    def feed(self, x: Tensor, out: Tensor) -> Tensor:
        for module, read in self._pairs:
            out = module.feed(x, out, read)
        return out

    def leave(self, hidden: Tensor) -> Tensor:
        for module, read in self._pairs:
            hidden = module.leave(hidden, read)
        return hidden


NO_MEMORIES = LayerMemories({}, {})


class TableShape(NamedTuple):
    """A table as checkpoints hold it."""

    layer: int
    """The layer that reads it."""
    rows: int
    width: int
    """Values of a row."""


class ExportedRows(NamedTuple):
    """A table as exports hold it: row ranges that are tensors of their own."""

    name: str
    """The row ranges are the tensors `name.parts.0`, `name.parts.1`, .."""
    rows: int
    width: int
    """Values of a row."""
    columns: tuple[str, ...]
    """The tables of a checkpoint that stand side by side in its rows, each `width / len(columns)` wide."""

    def part(self, number: int) -> str:
        """Name of the tensor of one row range."""
        return f"{self.name}.parts.{number}"


class ModelKind:
    """What a kind of memory says about a model: the half that ships with exports.

    `shape` is that of a model with this memory in all methods but `layers`.
    """

    name: str
    """Of its section in the model's configuration, of its module in a layer, and of its training half."""
    controls: tuple[str, ...]
    """What an evaluation can give the model in place of what it reads; the first is what it reads."""

    def trained_control(self, shape: Shape) -> str:
        """What a model reads that is used as it was trained; one of `controls`."""
        return self.controls[0]

    def has_control(self, shape: Shape, control: str) -> bool:
        """Whether this model can be given one of `controls`."""
        return True

    def telling_controls(self, shape: Shape) -> tuple[str, ...]:
        """Controls whose comparison with the model as it was trained says what the memory gives it."""
        trained = self.trained_control(shape)
        return tuple(known for known in self.controls if known != trained and self.has_control(shape, known))

    def check_control(self, shape: Shape, control: str) -> None:
        """Raises:
        ValueError: this model has no such control.
        """
        own = [known for known in self.controls if self.has_control(shape, known)]
        if control not in own:
            raise ValueError(f"this {self.name} has {', '.join(own)}")

    def layers(self, shape: Shape) -> tuple[int, ...]:
        """Layers that have this memory, ascending; none for a model without it."""
        raise NotImplementedError

    def module(self, shape: Shape, layer: int) -> MemoryModule:
        """The module of a layer that has this memory."""
        raise NotImplementedError

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        """Canonical name -> table, in the order of checkpoints."""
        raise NotImplementedError

    def exported_rows(self, shape: Shape) -> dict[int, ExportedRows]:
        """Key -> table. `config.json` has the rows of the parts of each under `NAME_parts` and its key."""
        return {
            table.layer: ExportedRows(name, table.rows, table.width, (name,))
            for name, table in self.tables(shape).items()
        }

    def exported_tensors(self, shape: Shape) -> dict[str, int]:
        """Name -> length of further int64 tensors in exports, which checkpoints do not have."""
        return {}

    def components(self, shape: Shape) -> dict[str, int]:
        """Name -> elements of the parts of the tables that are counted apart; together they are all elements."""
        return {f"{self.name}_table": sum(table.rows * table.width for table in self.tables(shape).values())}

    def fetched_values(self, shape: Shape) -> int:
        """Elements of tables that a context fetches once for all of its tokens; 0 where every token has its own."""
        return 0

    def row_values(self, shape: Shape, layer: int) -> int:
        """Elements of tables that one token reads in a layer."""
        raise NotImplementedError

    def multiplied_values(self, shape: Shape, layer: int) -> int:
        """Those of `row_values` that are matrices, which the token is multiplied with."""
        return 0
