"""What layers are told of the running step."""

import pytest
import torch

from kmem.config import parse_config
from kmem.model.mask import Documents
from kmem.model.memory_kind import OFF
from kmem.parallel.memory_kind import StageMemory
from kmem.parallel.stage_tables import LookedUp
from kmem.parallel.step_context import MicroBatch, StepContext
from tests.distributed.bank_case import addressed
from tests.distributed.training_case import small_config, synthetic_sequences

SHAPE = parse_config(small_config()).model.shape


class Memory(StageMemory):
    """Reads (its kind, the layer, the micro-batch)."""

    def __init__(self, kind, layers):
        self.kind, self.layers = kind, layers

    def read(self, layer, context):
        return self.kind, layer, context.running


class Beside:
    def __init__(self):
        self.device = None

    def to(self, device):
        moved = Beside()
        moved.device = device
        return moved


def micro_batches(*firsts, beside=None):
    device = torch.device("cpu")
    sequences = [addressed(synthetic_sequences([first]), [first]) for first in firsts]
    return [MicroBatch.on_device(one, SHAPE, device, beside or {}) for one in sequences]


def test_a_layer_reads_its_memories_or_that_they_are_off():
    context = StepContext(memories=[Memory("one", [0, 2]), Memory("two", [2, 3])])
    context.load(micro_batches(1, 2), LookedUp())
    for current in (0, 1):
        context.current = current
        assert context.read(1) == {}
        assert context.read(0) == {"one": ("one", 0, current)}
        assert context.read(2) == {"one": ("one", 2, current), "two": ("two", 2, current)}
    context.load(micro_batches(1, 2), LookedUp(controls={"two": "off"}))
    assert context.read(2) == {"one": ("one", 2, 1), "two": OFF}
    assert context.read(3)["two"] is OFF
    assert context.read(0) == {"one": ("one", 0, 1)}
    context.load(micro_batches(1), LookedUp())
    context.current = 0
    assert context.read(3) == {"two": ("two", 3, 0)}  # the next step has it again


def test_a_layer_outside_the_schedule_is_a_bug():
    context = StepContext(micro_batches=micro_batches(1))
    with pytest.raises(AssertionError, match="schedule"):
        context.micro_batch()


def test_attention_of_a_micro_batch_sees_its_documents():
    (first, second), whole = micro_batches(0, 3), synthetic_sequences([1])
    assert torch.equal(first.documents.index, Documents.of(first.sequences.document_ids).index)
    assert not torch.equal(first.documents.index, second.documents.index)
    whole.document_ids.zero_()
    assert MicroBatch.on_device(whole, SHAPE, torch.device("cpu"), {}).documents is None


def test_addresses_stay_on_the_host_and_what_they_mean_is_moved():
    (batch,) = micro_batches(1, beside={"bank": Beside()})
    assert batch.sequences.addresses is None
    assert batch.beside["bank"].device == torch.device("cpu")
    context = StepContext(micro_batches=[batch], current=0)
    assert context.beside("bank") is batch.beside["bank"]


def test_the_rows_of_a_step_are_let_go_when_it_is_done():
    context = StepContext()
    context.load(micro_batches(1), LookedUp(working_sets={"table": object()}))
    assert set(context.working_sets) == {"table"}
    context.unload()
    assert not context.working_sets
