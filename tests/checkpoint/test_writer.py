"""A checkpoint written tensor by tensor is read back, and an unfinished one is none."""

import os

import pytest
import torch

from kmem.checkpoint import writer
from kmem.checkpoint.commit import Progress
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.writer import write_weights
from kmem.config import UserError, parse_config

CONFIG = parse_config(
    {
        "name": "run",
        "model": {
            "vocab_size": 8,
            "hidden_size": 8,
            "num_layers": 1,
            "intermediate_size": 8,
            "attention": {"kind": "gqa", "num_heads": 2},
        },
        "data": {"sources": [{"path": "data"}], "sequence_length": 8},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "optimizer": {"lr": 1e-3}},
    }
)
PROGRESS = Progress(step=3, consumed_samples=24, tokens=192, optimizer_steps=3, facts={"loss": 1.5})
TENSORS = {"a": torch.randn(5, 7), "b": torch.randn(3), "c": torch.randn(2, 11, 3)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("part", [1, 4, 1000])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_parts_of_any_size_are_read_back(tmp_path, monkeypatch, part, chunk):
    monkeypatch.setattr(writer, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(writer, "FILE_BYTES", 200)
    folder = write_weights(
        tmp_path / "checkpoints", PROGRESS, CONFIG, SHAPES, lambda name: TENSORS[name].reshape(-1).split(part)
    )
    reader = CheckpointReader(tmp_path)
    reader.verify()
    assert reader.folder == folder
    assert reader.config == CONFIG
    assert reader.facts["loss"] == 1.5
    assert len(reader.commit.files) == 2
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read_rows(name, 1, 2), tensor[1:2])


@pytest.mark.parametrize("wrong", [lambda tensor: tensor[:1], lambda tensor: torch.cat([tensor, tensor])])
def test_too_few_or_too_many_values_leave_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"weight/c .*\b66 elements"):
        write_weights(
            tmp_path,
            PROGRESS,
            CONFIG,
            SHAPES,
            lambda name: [wrong(TENSORS[name]) if name == "c" else TENSORS[name]],
        )
    assert os.listdir(tmp_path) == []


def test_an_existing_checkpoint_is_kept(tmp_path):
    def write():
        return write_weights(tmp_path, PROGRESS, CONFIG, SHAPES, lambda name: [TENSORS[name]])

    folder = write()
    with pytest.raises(UserError, match="step-00000003: exists"):
        write()
    CheckpointReader(folder).verify()
