"""Global tensors in pieces, and the planners that let `torch.distributed.checkpoint` save and load them anywhere.

Every tensor of a checkpoint is one global 1-D tensor. A rank holds intervals of it: a whole replicated parameter, the
fragment that ZeRO gave it, its slice of the stacked experts, its range of table rows. A save writes each interval
once; a load asks for whatever intervals the new mesh needs.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from kmem.config import UserError

CHUNK_ELEMENTS = 1 << 24
"""Longest interval stored as one entry: a reader of a small part then touches at most 64 MiB of fp32."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found, trusted or used; the message names the file or tensor."""


class NotFiniteError(CheckpointError):
    """A state with values that are not finite, which is not saved."""


@dataclass(frozen=True)
class ScatteredRows:
    """An interval of live values whose rows are not contiguous: elements [start, stop) of `rows` [N, width] in
    row-major order. It has no flat view, so a save copies the values and a load writes them back.

    `fetch`, if given, is called with the rows [first, last) before they are read or written.
    """

    rows: Tensor
    start: int
    stop: int
    fetch: Callable[[int, int], object] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.stop - self.start])

    def numel(self) -> int:
        return self.stop - self.start

    def copy(self) -> Tensor:
        """The values, 1-D, on the device of the rows."""
        values = torch.empty(self.shape, dtype=self.dtype, device=self.rows.device)
        for live, place in self._blocks(0, self.numel()):
            values[place].view_as(live).copy_(live)
        return values

    def write(self, first: int, values: Tensor) -> None:
        """Overwrite the interval's elements from `first` on."""
        for live, place in self._blocks(first, first + values.numel()):
            live.copy_(values[place].view_as(live))

    def _blocks(self, first: int, last: int) -> Iterator[tuple[Tensor, slice]]:
        """Elements [first, last) of the interval in blocks of rows, the first and last of which may be cut short.
        Yields views of the live values and their slice of these elements."""
        width, begin, end = self.rows.shape[1], self.start + first, self.start + last
        if self.fetch is not None and end > begin:
            self.fetch(begin // width, -(-end // width))
        place = begin
        while place < end:
            row, column = divmod(place, width)
            if column or end - place < width:
                live = self.rows[row : row + 1, column : column + end - place]
            else:
                live = self.rows[row : end // width]
            yield live, slice(place - begin, place - begin + live.numel())
            place += live.numel()


@dataclass
class Pieces:
    """The intervals of one global 1-D tensor that this rank holds.

    Args:
        length: elements of the global tensor.
        parts: (start, live values) per interval, a 1-D view if the values are contiguous; loading writes into them.
    """

    length: int
    parts: list[tuple[int, Tensor | ScatteredRows]]

    @classmethod
    def interval(
        cls, length: int, start: int, values: Tensor, fetch: Callable[[int, int], object] | None = None
    ) -> "Pieces":
        """One interval, cut into entries of bounded length. Cuts lie at multiples of CHUNK_ELEMENTS of the global
        tensor, so that equal intervals of several ranks are recognised as copies.

        Args:
            values: contiguous, or [N, width] with contiguous rows.
            fetch: as in `ScatteredRows`.
        """
        end = start + values.numel()
        cuts = [start, *range((start // CHUNK_ELEMENTS + 1) * CHUNK_ELEMENTS, end, CHUNK_ELEMENTS), end]
        entries = [(a, b) for a, b in pairwise(cuts) if b > a]
        if values.dim() == 2 and not values.is_contiguous():
            return cls(length, [(a, ScatteredRows(values, a - start, b - start, fetch)) for a, b in entries])
        flat = values.reshape(-1)
        assert flat.data_ptr() == values.data_ptr(), "loading must write into the live tensor"
        return cls(length, [(a, flat[a - start : b - start]) for a, b in entries])

    def to_host(self) -> "Pieces":
        """A copy in host memory that later training steps do not change."""
        copies: list[tuple[int, Tensor | ScatteredRows]] = [
            (start, part.copy().cpu() if isinstance(part, ScatteredRows) else part.detach().to("cpu", copy=True))
            for start, part in self.parts
        ]
        return Pieces(self.length, copies)

    def find(self, index: MetadataIndex) -> Tensor | ScatteredRows:
        """The interval that a plan entry refers to."""
        _, wanted = index_key(index)
        return next(part for start, part in self.parts if start == wanted)

    # The interface that torch's default planners expect of an object that is not a tensor.
    def size(self) -> torch.Size:
        return torch.Size([self.length])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([start]), part.shape) for start, part in self.parts]

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size([start]), part.shape),
                    properties=TensorProperties.create_from_tensor(
                        part.rows if isinstance(part, ScatteredRows) else part
                    ),
                    size=self.size(),
                ),
            )
            for start, part in self.parts
        ]


class PiecesSavePlanner(DefaultSavePlanner):
    """Saves `Pieces` as they are, without flattening names. Scattered rows are copied when the writer resolves their
    entry: a writer that resolves one entry at a time holds one copy.

    Args:
        partial: by name, whether the ranks together hold only a part of the tensor.
    """

    def __init__(self, partial: Callable[[str], bool] = lambda name: False) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._partial = partial

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Plan each interval once, and check that the intervals cover every tensor that is not partial. torch's
        planner would refuse partial tensors."""
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            intervals = sorted((chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) for chunk in stored.chunks)
            ends = [(stored.size[0],) * 2]
            apart = all(one[1] <= other[0] for one, other in pairwise(intervals + ends))
            whole = sum(stop - start for start, stop in intervals) == stored.size[0]
            assert apart, f"{name}: intervals of ranks overlap: {intervals}"
            assert whole or self._partial(name), f"{name}: the ranks hold {intervals} of {stored.size[0]} elements"
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        part = self.state_dict[index.fqn].find(index)
        return part.copy() if isinstance(part, ScatteredRows) else part


class PiecesLoadPlanner(DefaultLoadPlanner):
    """Loads into `Pieces` in place, and checks what torch's planner does not: dtype, size, that nothing is missing.

    Args:
        rounding: live values may have another dtype, to which the stored values are rounded.
    """

    def __init__(self, rounding: bool = False) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rounding = rounding

    def set_up_planner(self, state_dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # The base class would replace objects that it does not know by None.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.state_dict[read_item.dest_index.fqn].find(read_item.dest_index)
        if isinstance(part, ScatteredRows):  # `commit_tensor` copies it into the rows
            return torch.empty(read_item.lengths, dtype=part.dtype)
        return part.detach().narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        part = self.state_dict[read_item.dest_index.fqn].find(read_item.dest_index)
        if isinstance(part, ScatteredRows):
            part.write(read_item.dest_offsets[0], tensor)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for name, pieces in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"{name} is not in the checkpoint")
            if stored.size != pieces.size():
                raise CheckpointError(
                    f"{name} has {stored.size[0]} elements in the checkpoint and {pieces.length} here"
                )
            dtypes = {part.dtype for _, part in pieces.parts} - {stored.properties.dtype}
            if dtypes and not self._rounding:
                raise CheckpointError(f"{name} is {stored.properties.dtype} in the checkpoint and {dtypes.pop()} here")
        plan = super().create_local_plan()
        covered: Counter[tuple[str, int]] = Counter()
        for item in plan.items:
            covered[index_key(item.dest_index)] += item.lengths.numel()
        for name, pieces in self.state_dict.items():
            for start, part in pieces.parts:
                if covered[name, start] != part.numel():
                    raise CheckpointError(f"{name} has a hole in [{start}, {start + part.numel()})")
        return plan


def index_key(index: MetadataIndex) -> tuple[str, int]:
    """(tensor, start of the interval) of a plan entry."""
    assert index.offset is not None
    return index.fqn, index.offset[0]
