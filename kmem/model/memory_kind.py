"""The interface between a model and its memories.

The name of a kind of memory is the name of its section in the model's configuration (`model.engram`, `model.bank`).
`ModelKind` describes a kind to the model; `MemoryModule` is its computation in a layer. A layer calls its memories at
these places, whatever their kinds are:

    enter         the entrance of the layer, on the residual stream; in layer 0, this is the input embedding
    project       every projection of the attention and of a dense feed-forward
    attend        the queries of the attention
    feed          the feed-forward's input and output
    leave         the end of the layer, on the residual stream, beside the input embedding if a kind asks for it

The training half of a kind has the same name, in `kmem/parallel/memory_kinds.py`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .shape import Shape

if TYPE_CHECKING:
    from .exported_memory import ExportedMemory

# Shape letters: B sequences, T tokens, H hidden size, M branches of the residual stream, h heads, e width of a query
# head, e' width of a value head.


class MemoryModule(nn.Module):
    """The computation of a kind in one layer. The default of every method leaves the layer unchanged.

    `read` is the kind's input in this layer for the current tokens, such as looked-up rows. Each kind has its own type
    for it.
    """

    knows_off = False
    """Whether it is also called under the control "off", with `read` OFF, because the layer computes otherwise without
    the memory than it would have without the module."""

    def enter(self, hidden: Tensor, read: Any) -> Tensor:
        """The residual stream [B, T, H] or [B, T, M, H] at the entrance of the layer."""
        return hidden

    def project(self, name: str, x: Tensor, out: Tensor, read: Any) -> Tensor:
        """The output [B, T, ..] of the projection `name` (such as "q_proj") of x [B, T, ..]."""
        return out

    def attend(self, query: Tensor, read: Any) -> Tensor | None:
        """The addition to the output of the attention's heads, [B, T, h * e'], for queries [B, T, h, e] that are normed
        and not rotated; None: nothing is added."""
        return None

    def feed(self, x: Tensor, out: Tensor | None, read: Any) -> Tensor | None:
        """The feed-forward's output [B, T, H] for its normed input x [B, T, H]. `out` is None in a layer whose
        feed-forward the kind replaces (`ModelKind.replaces_feed_forward`)."""
        return out

    def leave(self, hidden: Tensor, embedding: Tensor | None, read: Any) -> Tensor:
        """The residual stream at the end of the layer; `embedding` [B, T, H] if `ModelKind.carries_embedding`."""
        return hidden


OFF = object()
"""In place of a kind's input: the layer computes without this memory. It serves as a control."""


class LayerMemories:
    """The memories of one layer, with their inputs for the current tokens."""

    def __init__(self, modules: Mapping[str, MemoryModule], reads: Mapping[str, Any]) -> None:
        assert modules.keys() == reads.keys(), (
            f"a layer with the memories {list(modules)} was given inputs for {list(reads)}"
        )
        self._pairs = [
            (module, reads[kind]) for kind, module in modules.items() if reads[kind] is not OFF or module.knows_off
        ]

    def enter(self, hidden: Tensor) -> Tensor:
        for module, read in self._pairs:
            hidden = module.enter(hidden, read)
        return hidden

    def project(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        for module, read in self._pairs:
            out = module.project(name, x, out, read)
        return out

    def attend(self, query: Tensor, out: Tensor) -> Tensor:
        """The output of the heads [B, T, h * e'] plus the memories' additions."""
        for module, read in self._pairs:
            added = module.attend(query, read)
            out = out if added is None else out + added
        return out

    def feed(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The feed-forward's output; zeros where a kind replaces it and is switched off."""
        for module, read in self._pairs:
            out = module.feed(x, out, read)
        return torch.zeros_like(x) if out is None else out

    def leave(self, hidden: Tensor, embedding: Tensor | None) -> Tensor:
        for module, read in self._pairs:
            hidden = module.leave(hidden, embedding, read)
        return hidden


NO_MEMORIES = LayerMemories({}, {})


class TableShape(NamedTuple):
    """A table in the form that checkpoints hold."""

    layer: int
    """The layer that reads it."""
    rows: int
    width: int
    """Number of values per row."""


class ExportedRows(NamedTuple):
    """A table in the form that exports hold: each range of rows is a separate tensor."""

    name: str
    """The row ranges are the tensors `name.parts.0`, `name.parts.1`, .."""
    rows: int
    width: int
    """Number of values per row."""
    columns: tuple[str, ...]
    """The checkpoint tables that lie side by side in a row, each `width / len(columns)` wide."""

    def part(self, number: int) -> str:
        """Name of the tensor of one row range."""
        return f"{self.name}.parts.{number}"


class ModelKind:
    """Describes a kind of memory to the model: the half of a kind that ships with exports.

    In all methods but `layers`, `shape` is the shape of a model with this memory.
    """

    name: str
    """Name of the section in the model's configuration, of the module in a layer, and of the training half."""
    title: str
    """What it is, in a phrase such as "an n-gram memory (engram)"."""
    controls: tuple[str, ...]
    """Inputs that an evaluation can give the memory. The first is its normal input, the others replace it."""

    def trained_control(self, shape: Shape) -> str:
        """The one of `controls` under which the model was trained."""
        return self.controls[0]

    def has_control(self, shape: Shape, control: str) -> bool:
        """Whether this model supports one of `controls`."""
        return True

    def telling_controls(self, shape: Shape) -> tuple[str, ...]:
        """The controls to compare with the model as trained, to measure how much the memory contributes."""
        trained = self.trained_control(shape)
        return tuple(known for known in self.controls if known != trained and self.has_control(shape, known))

    def check_control(self, shape: Shape, control: str) -> None:
        """Refuse a control that this model does not support.

        Raises:
            ValueError: names the controls that the model supports.
        """
        supported = [known for known in self.controls if self.has_control(shape, known)]
        if control not in supported:
            raise ValueError(f"this {self.name} has {', '.join(supported)}")

    def layers(self, shape: Shape) -> tuple[int, ...]:
        """Layers that have this memory, ascending; none for a model without it."""
        raise NotImplementedError

    def module(self, shape: Shape, layer: int) -> MemoryModule:
        """The module of a layer that has this memory."""
        raise NotImplementedError

    def replaces_feed_forward(self, shape: Shape, layer: int) -> bool:
        """Whether the layer's feed-forward is this memory: the layer has no other."""
        return False

    def carries_embedding(self, shape: Shape) -> bool:
        """Whether the kind's modules read the input embedding at the end of layers. It then goes along with the
        residual stream, so that it crosses pipeline stages."""
        return False

    def tables(self, shape: Shape) -> dict[str, TableShape]:
        """Canonical name -> table, in the order of checkpoints."""
        raise NotImplementedError

    def init_std(self, shape: Shape) -> float:
        """Standard deviation of the initial values of rows."""
        raise NotImplementedError

    exported: type["ExportedMemory"]
    """The memory of a whole model in one process, such as an export."""
    exported_fields: tuple[str, ...] = ()
    """Fields of an export's config.json that describe the rows, without the kind's name before them, in addition to
    `parts`."""

    def exported_rows(self, shape: Shape) -> dict[int, ExportedRows]:
        """Key -> table. In config.json, the field `NAME_parts` holds under this key the numbers of rows of the table's
        parts."""
        return {
            table.layer: ExportedRows(name, table.rows, table.width, (name,))
            for name, table in self.tables(shape).items()
        }

    def exported_tensors(self, shape: Shape) -> dict[str, int]:
        """Name -> length of the int64 tensors that exports hold in addition to the checkpoint's."""
        return {}

    def components(self, shape: Shape) -> dict[str, int]:
        """Name -> number of elements of each separately counted part of the tables; together, all their elements."""
        return {f"{self.name}_table": sum(table.rows * table.width for table in self.tables(shape).values())}

    def fetched_values(self, shape: Shape) -> int:
        """Number of table elements that a context fetches once for all its tokens; 0 if each token reads its own
        rows."""
        return 0

    def row_values(self, shape: Shape, layer: int) -> int:
        """Number of table elements that one token reads in a layer."""
        raise NotImplementedError

    def multiplied_values(self, shape: Shape, layer: int) -> int:
        """How many of `row_values` are elements of matrices by which the token is multiplied."""
        return 0
