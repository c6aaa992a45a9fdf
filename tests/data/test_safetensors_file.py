"""A written file is what the safetensors library reads, and an unfinished one never has the final name."""

import hashlib
import os

import pytest
import torch
from safetensors import safe_open

from kmem.config import UserError
from kmem.data import safetensors_file
from kmem.data.safetensors_file import DTYPE_NAMES, SafetensorsWriter


def declared(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_every_dtype_and_odd_shape_is_read_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in sorted(DTYPE_NAMES, key=lambda dtype: -dtype.itemsize):
        for shape in [(), (0,), (3,), (2, 3, 5), (0, 4)]:
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            tensors[f"{dtype}{list(shape)}é"] = raw.view(dtype).reshape(shape)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, declared(tensors), {"format": "pt", "step": "7"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found, metadata = read(path)
    assert metadata == {"format": "pt", "step": "7"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.size == path.stat().st_size
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_slices_and_strided_tensors_give_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "SLICE_BYTES", 100)  # several slices, none a whole number of rows
    tensor = torch.randn(23, 7)
    names = ["whole", "strided", "rows"]
    with SafetensorsWriter(tmp_path / "a", {name: ((23, 7), torch.float32) for name in names}) as writer:
        writer.write("whole", tensor)
        writer.write("strided", tensor.t().contiguous().t())
        for start in range(0, 23, 5):
            writer.write_values("rows", tensor[start : start + 5])
    found, _ = read(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name in names)


def interrupt(writer, tensor):
    raise KeyboardInterrupt


FAULTS = {
    "a tensor is missing": lambda writer, tensor: None,
    "the block raises": interrupt,
    "wrong order": lambda writer, tensor: writer.write("z", tensor),
    "wrong shape": lambda writer, tensor: writer.write("y", tensor[:3]),
    "wrong dtype": lambda writer, tensor: writer.write("y", tensor.bfloat16()),
    "too many values": lambda writer, tensor: writer.write_values("y", torch.cat([tensor, tensor])),
    "half a tensor": lambda writer, tensor: writer.write_values("y", tensor[:2]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_no_file(tmp_path, fault):
    tensor = torch.zeros(4, 2)

    def write():
        with SafetensorsWriter(tmp_path / "a", {name: ((4, 2), torch.float32) for name in "xyz"}) as writer:
            writer.write("x", tensor)
            FAULTS[fault](writer, tensor)

    with pytest.raises((ValueError, KeyboardInterrupt)):
        write()
    assert os.listdir(tmp_path) == []


def test_misaligned_order_and_unknown_dtype_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^y: torch\.float32 .*\b6\b"):
        SafetensorsWriter(tmp_path / "a", {"x": ((3,), torch.bfloat16), "y": ((3,), torch.float32)})
    with pytest.raises(ValueError, match=r"^x: .*torch\.complex64"):
        SafetensorsWriter(tmp_path / "a", {"x": ((3,), torch.complex64)})
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_path_and_bytes(tmp_path):
    os.symlink("/dev/full", tmp_path / "a.partial")
    with pytest.raises(UserError, match=r"/a: .*space.* \d+ bytes"):
        SafetensorsWriter(tmp_path / "a", {"x": ((4, 2), torch.float32)})
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"/no/a: .*No such file"):
        SafetensorsWriter(tmp_path / "no" / "a", {})


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path):
    for value in (1.0, 2.0):
        with SafetensorsWriter(tmp_path / "a", {"x": ((1,), torch.float32)}) as writer:
            writer.write("x", torch.tensor([value]))
            if value == 2.0:
                assert read(tmp_path / "a")[0]["x"].item() == 1.0
    assert read(tmp_path / "a")[0]["x"].item() == 2.0
