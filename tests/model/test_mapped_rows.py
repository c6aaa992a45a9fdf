"""Rows that stay in safetensors files."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kmem.model.export_tables import RowTable
from kmem.model.mapped_rows import MappedRows, SafetensorsFile, Segment

ROWS, DIM = 61, 12


def table(dtype=torch.float32, seed=0):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(*size):
    return torch.randint(ROWS, size, generator=torch.Generator().manual_seed(1))


def stored(folder, parts, files=2):
    """The parts, each under its number, spread over several files among other tensors; where they are."""
    held = [{"other": torch.ones(3, dtype=torch.bfloat16)} for _ in range(files)]
    for number, part in enumerate(parts):
        held[number % files][str(number)] = part.clone()
    for number, tensors in enumerate(held):
        save_file(tensors, folder / f"{number}.safetensors")
    return [(folder / f"{number % files}.safetensors", str(number), len(part)) for number, part in enumerate(parts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [[ROWS], [20, 1, 40], [1] * ROWS])
def test_row_ranges_are_one_table(cuts, dtype, tmp_path):
    whole = table(dtype)
    rows = MappedRows.open("t", DIM, stored(tmp_path, whole.split(cuts)))
    assert (len(rows), rows.dtype) == (ROWS, dtype)
    for shape in [(7,), (2, 5, 3), (0, 4), ()]:
        found = rows(ids(*shape))
        assert found.dtype == dtype
        assert torch.equal(found, whole[ids(*shape)])
    assert torch.equal(rows(torch.arange(ROWS)), whole)
    found = rows(torch.tensor([3, 3]))
    found.zero_()  # what was read is a copy
    assert torch.equal(rows(torch.tensor([3])), whole[3:4])


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("length", [5, 100, 101, ROWS * DIM])
def test_intervals_that_cut_rows_are_one_table(length, files, tmp_path):
    """As checkpoints store long tensors; here also with a row over three intervals, and out of order in the files."""
    whole = table()
    places = stored(tmp_path, whole.flatten().split(length)[::-1], files)
    opened = {path: SafetensorsFile(path) for path, _, _ in places}
    rows = MappedRows("t", DIM, [Segment(opened[path], name) for path, name, _ in reversed(places)])
    assert torch.equal(rows(ids(4, 9)), whole[ids(4, 9)])
    assert torch.equal(rows(torch.arange(ROWS)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [DIM * 61, DIM * 20, 100])
def test_long_rows_are_read_in_one_piece(length, dtype, tmp_path, monkeypatch):
    """The same rows, whichever way; those that lie across intervals are copies already."""
    whole = table(dtype)
    places = stored(tmp_path, whole.flatten().split(length))
    opened = {path: SafetensorsFile(path) for path, _, _ in places}
    rows = MappedRows("t", DIM, [Segment(opened[path], name) for path, name, _ in places])
    mapped = rows(ids(4, 9))
    monkeypatch.setattr("kmem.model.mapped_rows.LONG_ROW", DIM)
    reads = []
    read_into = SafetensorsFile.read_into
    monkeypatch.setattr(
        SafetensorsFile,
        "read_into",
        lambda file, out, start: (reads.append((file.path, start)), read_into(file, out, start)),
    )
    assert torch.equal(rows(ids(4, 9)), mapped)
    assert torch.equal(rows(torch.arange(ROWS)), whole)
    cut = [row for row in range(ROWS) if row * DIM // length != (row * DIM + DIM - 1) // length]
    assert len(set(reads)) == ROWS - len(cut)
    for path in opened:
        path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(ValueError, match=r"\.safetensors: truncated while\b"):
        rows(torch.arange(ROWS))


def test_files_are_closed(tmp_path):
    rows = MappedRows.open("t", DIM, stored(tmp_path, [table()], files=1))
    descriptor = rows._parts[0].file._descriptor
    os.fstat(descriptor)
    del rows
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_copies_share_the_files(tmp_path):
    rows = MappedRows.open("t", DIM, stored(tmp_path, [table()]))
    assert copy.deepcopy(rows) is rows
    assert copy.copy(rows) is rows


def test_other_processes_map_the_files_again(tmp_path, monkeypatch):
    whole = table()
    monkeypatch.chdir(tmp_path)  # paths are kept whole
    places = stored(tmp_path, whole.flatten().split(100), files=1)
    file = SafetensorsFile(places[0][0].name)
    rows = MappedRows("t", DIM, [Segment(file, name) for _, name, _ in places])
    kept = pickle.dumps((rows, file))
    assert len(kept) < whole.nbytes / 2
    monkeypatch.chdir("/")
    again, file_again = pickle.loads(kept)  # noqa: S301
    assert again.files == [file_again]  # mapped once
    assert torch.equal(again(ids(4, 9)), whole[ids(4, 9)])
    (tmp_path / "kept").write_bytes(kept)
    program = (
        "import pickle, sys, torch; print(pickle.load(open(sys.argv[1], 'rb'))[0](torch.tensor([7, 60])).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "kept")], capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(done.stdout) == whole[[7, 60]].tolist()


def test_another_file_in_its_place_is_refused(tmp_path):
    rows = MappedRows.open("t", DIM, stored(tmp_path, [table()], files=1))
    kept, (path,) = pickle.dumps(rows), [file.path for file in rows.files]
    other = table(seed=1)
    save_file({"other": torch.ones(3, dtype=torch.bfloat16), "0": other}, path)
    os.utime(path, ns=(0, 0))  # at another time, whatever the clock's steps
    with pytest.raises(ValueError, match=r"0\.safetensors: changed\b"):
        pickle.loads(kept)  # noqa: S301
    path.unlink()
    with pytest.raises(ValueError, match=r"0\.safetensors: .*No such file"):
        pickle.loads(kept)  # noqa: S301


def test_rows_outside_the_table_are_refused(tmp_path):
    rows = MappedRows.open("t", DIM, stored(tmp_path, [table()]))
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError, match=rf"^t .*\b61 rows\b.*{wrong}\b"):
            rows(torch.tensor([0, wrong]))


def test_a_table_in_parts_is_the_table():
    whole = table()
    parts = RowTable([20, 1, 40], DIM)
    for part, values in zip(parts.parts, whole.split([20, 1, 40]), strict=True):
        part.data.copy_(values)
    assert torch.equal(parts(ids(3, 5)), whole[ids(3, 5)])
    expected = whole.requires_grad_()
    weight = torch.randn(3, 5, DIM)
    (parts(ids(3, 5)) * weight).sum().backward()
    (expected[ids(3, 5)] * weight).sum().backward()
    torch.testing.assert_close(torch.cat([part.grad for part in parts.parts]), expected.grad)


def test_files_that_do_not_hold_the_table_are_named(tmp_path):
    places = stored(tmp_path, table().split([31, 30]))
    path = places[1][0]

    def refused(message, parts=places, dim=DIM):
        with pytest.raises(ValueError, match=message):
            MappedRows.open("t", dim, parts)

    refused(r"1\.safetensors: 1 .*\[30, 12\].*\[29, 12\]", [places[0], (path, "1", 29)])
    refused(r"0\.safetensors: 0 .*\[31, 12\].*\[31, 6\]", dim=6)
    refused(r"1\.safetensors: .*tensor 9$", [(path, "9", 30)])
    refused("^t: no file", [])
    refused(r"absent\.safetensors: .*No such file", [(tmp_path / "absent.safetensors", "0", 31)])

    save_file({"1": table()[:30].bfloat16()}, path)
    refused(r"1\.safetensors: 1 .*BF16.*\bt\b.*F32")
    save_file({"1": torch.zeros(30, DIM, dtype=torch.int32)}, path)
    refused(r"1\.safetensors: 1 .*I32.*F32, BF16, F16")
    save_file({"1": table()[:30].clone()}, path)
    whole = path.read_bytes()
    for content, message in [
        (whole[:-4], r"truncated: \d+ bytes of \d+"),
        (whole[:30], "safetensors file"),
        (b"", "safetensors file"),
        (b"\xff" * 64, "safetensors file"),
        ((8).to_bytes(8, "little") + b"{nothing" + b" " * 64, "header .*property name"),
        (header({"1": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}), "header .*: 1 .*shape"),
        (header({"1": {"dtype": "F32", "shape": [2, 2]}}), "header .*'data_offsets'"),
    ]:
        path.write_bytes(content)
        refused(rf"1\.safetensors: .*{message}")


def header(tree):
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


def test_half_a_row_is_refused(tmp_path):
    (place,) = stored(tmp_path, [table().flatten()[:-5]])
    with pytest.raises(ValueError, match=r"^t: .*\b12 values"):
        MappedRows("t", DIM, [Segment(SafetensorsFile(place[0]), place[1])])
