"""What the layers of a stage know about the running step.

Nothing but the hidden tensor crosses a stage boundary: every stage reads the step's token ids for itself, and the
engine says which micro-batch a layer is working on, in the forward pass and in its recomputation.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kmem.data.batch import SequenceBatch
from kmem.model.bank_blocks import BankInput
from kmem.model.bank_layout import BankLayout
from kmem.model.engram import EngramInput
from kmem.model.engram_reader import table_name
from kmem.model.mask import packed_mask, several_documents
from kmem.model.rope import Rotation, rotation
from kmem.model.shape import Shape
from kmem.parallel.bank_step import MicroBatchBlocks
from kmem.parallel.bank_table import stage_table_name
from kmem.tables.working_set import WorkingSet


@dataclass
class MicroBatch:
    """One micro-batch on the device of this rank. B sequences of T tokens."""

    sequences: SequenceBatch
    packed: bool
    """Whether attention needs a mask of document boundaries."""
    rotary: Rotation
    """The rotary table of these positions, shared by all layers."""
    blocks: MicroBatchBlocks | None = None
    """What the memory bank has for these sequences, in all layers of the stage."""

    @classmethod
    def on_device(
        cls, sequences: SequenceBatch, shape: Shape, device: torch.device, blocks: MicroBatchBlocks | None = None
    ) -> "MicroBatch":
        packed = several_documents(sequences.document_ids)  # on the host, where looking costs no wait
        # Addresses stay there: `blocks` is what they mean.
        present = {name: value for name, value in vars(sequences).items() if value is not None and name != "addresses"}
        moved = SequenceBatch(**{name: value.to(device) for name, value in present.items()})
        return cls(moved, packed, rotation(shape, moved.position_ids), None if blocks is None else blocks.to(device))


@dataclass
class StepContext:
    """The micro-batches of the running step and the number of the one being computed.

    Plain attributes, not thread-local ones: on CUDA autograd recomputes layers in a thread of its own.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    current: int | None = None
    recording: bool = False
    """True while training, False in evaluation, whose statistics do not count."""
    loss_factor: float = 1.0
    """Factor on the summed cross entropy of a micro-batch."""
    working_sets: dict[str, WorkingSet] = field(default_factory=dict)
    """By table: the rows that the step's micro-batches look up."""
    frozen: bool = False
    """Only the memory bank is trained: gradients of hidden states are needed, none of weights."""
    bank_layout: BankLayout | None = None
    """Of the memory bank's blocks in this stage's layers; None where they have none."""
    _mask: tuple[int, Tensor] | None = None

    def micro_batch(self) -> MicroBatch:
        assert self.current is not None, "a layer ran outside the schedule of the engine"
        return self.micro_batches[self.current]

    def mask(self) -> Tensor | None:
        """Attention mask of the running micro-batch, [B, 1, T, T] bool, True where attention is allowed; None when
        plain causal attention is right. One exists at a time: it is T times as large as the micro-batch."""
        micro = self.micro_batch()
        if not micro.packed:
            return None
        assert self.current is not None
        if self._mask is None or self._mask[0] != self.current:
            self._mask = self.current, packed_mask(micro.sequences.document_ids)
        return self._mask[1]

    def padding(self) -> Tensor | None:
        """[B, T] bool, True where the running micro-batch holds no token; None where it holds one everywhere."""
        return self.micro_batch().sequences.padding

    def engram(self, layer: int) -> EngramInput | None:
        """What a layer's memory holds for the running micro-batch; None where the layer has none."""
        working_set = self.working_sets.get(table_name(layer))
        if working_set is None:
            return None
        assert self.current is not None
        rows = working_set.lookup(self.current).flatten(-2)
        return EngramInput(rows, document_ids=self.micro_batch().sequences.document_ids)

    def bank(self, layer: int) -> BankInput | None:
        """The blocks of a layer for the running micro-batch; None where the layer has none."""
        layout = self.bank_layout
        if layout is None or layer not in layout.layers:
            return None
        used = self.micro_batch().blocks
        assert used is not None
        blocks = {}
        for level in {level for group in used.groups for level in group.counts}:
            width = layout.block_values(level)
            start = layout.layers.index(layer) * width
            working_set = self.working_sets[stage_table_name(layout, level)]
            blocks[level] = working_set.columns(used.rows[level], start, start + width)
        return BankInput(layout, used.groups, blocks)

    def load(self, micro_batches: list[MicroBatch], working_sets: dict[str, WorkingSet]) -> None:
        """Make these the micro-batches of the running step, and these the rows they look up."""
        self.micro_batches, self.working_sets, self._mask = micro_batches, working_sets, None

    def unload(self) -> None:
        """Let go of the rows of a step that is done."""
        self.working_sets = {}
