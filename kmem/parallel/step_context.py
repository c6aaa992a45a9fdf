"""What the layers of a stage know about the running step.

Only the hidden tensor crosses a stage boundary. Every stage reads the step's token ids itself, and the engine says
which micro-batch a layer is computing, in the forward pass and in its recomputation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kmem.data.batch import SequenceBatch
from kmem.model.mask import Documents
from kmem.model.memory_kind import OFF
from kmem.model.rope import Rotation, rotation
from kmem.model.shape import Shape
from kmem.parallel.memory_kind import StageMemory
from kmem.parallel.stage_tables import LookedUp
from kmem.tables.working_set import WorkingSet


@dataclass
class MicroBatch:
    """One micro-batch on the device of this rank. B sequences of T tokens."""

    sequences: SequenceBatch
    documents: Documents | None
    """What attention sees; None: each sequence is one document."""
    rotary: Rotation
    """The rotary table of these positions, shared by all layers."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Kind of memory -> data that its layers need besides rows."""

    @classmethod
    def on_device(
        cls, sequences: SequenceBatch, shape: Shape, device: torch.device, beside: Mapping[str, Any]
    ) -> "MicroBatch":
        documents = Documents.of(sequences.document_ids)  # on the host, where it waits for no kernel
        # Addresses stay on the host: `beside` holds what follows from them.
        present = {name: value for name, value in vars(sequences).items() if value is not None and name != "addresses"}
        moved = SequenceBatch(**{name: value.to(device) for name, value in present.items()})
        there = {kind: value.to(device) for kind, value in beside.items()}
        on_device = None if documents is None else documents.to(device)
        return cls(moved, on_device, rotation(shape, moved.position_ids), there)


@dataclass
class StepContext:
    """The micro-batches of the running step, and the number of the micro-batch being computed.

    Its attributes are not thread-local: on CUDA, autograd recomputes layers in a thread of its own.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    current: int | None = None
    recording: bool = False
    """True in training; False in evaluation, whose statistics do not count."""
    loss_factor: float = 1.0
    """Factor on the summed cross entropy of a micro-batch."""
    working_sets: dict[str, WorkingSet] = field(default_factory=dict)
    """Table, or look-up of the forward pass -> rows that the step's micro-batches look up."""
    frozen: bool = False
    """Only the bank is trained: hidden states need gradients, weights do not."""
    memories: Sequence[StageMemory] = ()
    """Memories of this stage."""
    controls: Mapping[str, str] = field(default_factory=dict)
    """Kind of memory -> control that replaces what training reads."""

    @property
    def running(self) -> int:
        """The number of the running micro-batch."""
        assert self.current is not None, "a layer ran outside the schedule of the engine"
        return self.current

    def micro_batch(self) -> MicroBatch:
        return self.micro_batches[self.running]

    def padding(self) -> Tensor | None:
        """[B, T] bool, True where the running micro-batch is padded; None if it has no padding."""
        return self.micro_batch().sequences.padding

    def read(self, layer: int) -> dict[str, Any]:
        """Kind -> input of a layer's memory for the running micro-batch."""
        return {
            memory.kind: OFF if self.controls.get(memory.kind) == "off" else memory.read(layer, self)
            for memory in self.memories
            if layer in memory.layers
        }

    def beside(self, kind: str) -> Any:
        """Data that layers with this kind of memory need besides rows, for the running micro-batch."""
        return self.micro_batch().beside[kind]

    def finite(self) -> bool:
        """Whether all row gradients of this rank are finite."""
        flags = [working_set.finite() for working_set in self.working_sets.values()]
        return all(memory.finite() for memory in self.memories) and (not flags or bool(torch.stack(flags).all()))

    def load(self, micro_batches: list[MicroBatch], looked_up: LookedUp) -> None:
        """Set the micro-batches of the running step and their look-ups."""
        self.micro_batches = micro_batches
        self.working_sets, self.controls = looked_up.working_sets, looked_up.controls

    def unload(self) -> None:
        """Release the rows of a finished step."""
        self.working_sets = {}
