import errno
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from kmem.tables import counter_random, stores
from kmem.tables.sharding import boundaries, row_range
from kmem.tables.stores import ArrayLayout, RecordLayout, Store, StoreError

LAYOUT = {
    "rows": ArrayLayout(6, torch.bfloat16),
    "moments": ArrayLayout(6, torch.float32),
    "last_step": ArrayLayout(1, torch.int32),
}


def splitmix64(state: int) -> int:
    """Straight from the definition, in Python integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("rows, ranks", [(10, 1), (10, 3), (3, 4), (0, 2), (1001, 7)])
def test_ranges_cover_every_row_once_and_are_even(rows, ranks):
    ranges = [row_range(rows, ranks, rank) for rank in range(ranks)]
    assert [row for part in ranges for row in range(part.start, part.stop)] == list(range(rows))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert boundaries(rows, ranks).tolist() == [part.start for part in ranges] + [rows]


@pytest.mark.parametrize("kind", ["device", "host", "mmap"])
def test_all_kinds_hold_the_same_arrays(kind, tmp_path):
    store = Store(kind, 100, LAYOUT, path=tmp_path / "table.bin")
    assert all(not array.any() for array in store.arrays.values())
    for number, array in enumerate(store.arrays.values()):
        array.fill_(number + 1)
    assert [array.unique().item() for array in store.arrays.values()] == [1, 2, 3]
    assert [array.shape for array in store.arrays.values()] == [(100, 6), (100, 6), (100, 1)]
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["host", "mmap"])
def test_compiled_loops_see_every_array_in_contiguous_rows(kind, tmp_path):
    store = Store(kind, 50, LAYOUT, path=tmp_path / "t")
    for name, array in store.arrays.items():
        array.copy_(torch.randint(0, 100, array.shape))
        values, start = store.columns(name)
        assert values.flags.c_contiguous
        columns = torch.from_numpy(values).view(array.dtype)[:, int(start) : int(start) + array.shape[1]]
        assert torch.equal(columns, array)


def adam_arrays(dim, dtype):
    vector = ArrayLayout(dim, torch.float32)
    return {"rows": ArrayLayout(dim, dtype), "m": vector, "v": vector, "busy": ArrayLayout(1, torch.uint8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80, 256, 341, 500, 2048])
def test_a_record_is_contiguous_and_in_few_pages(dim, dtype, tmp_path):
    arrays = adam_arrays(dim, dtype)
    layout = RecordLayout.of(arrays)
    used = sum(array.row_bytes for array in arrays.values())
    ends = [offset + arrays[name].row_bytes for name, offset in layout.offsets.items()]
    assert all(end <= start < end + 4 for end, start in zip(ends, [*layout.offsets.values()][1:], strict=False))
    assert layout.size == ends[-1]
    assert used <= layout.size <= layout.stride < max(4 / 3 * (used + 8), used + 12)
    assert all(offset % arrays[name].dtype.itemsize == 0 for name, offset in layout.offsets.items())
    starts = np.arange(4096) * layout.stride
    pages = (starts + layout.size - 1) // 4096 - starts // 4096 + 1
    assert layout.mean_pages == pages.mean() <= 1 + layout.size / 4096
    assert pages.max() <= -(-layout.size // 4096) + 1
    store = Store("mmap", 9, arrays, path=tmp_path / "t")
    first = {name: array.data_ptr() - store["rows"].data_ptr() for name, array in store.arrays.items()}
    assert first == layout.offsets
    assert all(array.stride() == (layout.stride // array.element_size(), 1) for array in store.arrays.values())


def test_records_are_padded_to_a_page_only_where_that_pays():
    assert RecordLayout.of(adam_arrays(64, torch.float32)).stride == 772
    assert RecordLayout.of(adam_arrays(80, torch.float32)).stride == 1024
    assert RecordLayout.of(adam_arrays(256, torch.float32)).stride == 4096  # 3076 bytes lie in 1.75 pages
    assert RecordLayout.of(adam_arrays(256, torch.bfloat16)).stride == 2564  # half as much again for 1.6 pages


@pytest.mark.parametrize("writing", [False, True])
def test_fetching_ahead_changes_nothing(writing, tmp_path):
    store = Store("mmap", 3000, LAYOUT, path=tmp_path / "t")
    for number, array in enumerate(store.arrays.values()):
        array.copy_(torch.arange(3000)[:, None] % 100 + number)
    before = {name: array.clone() for name, array in store.arrays.items()}
    for rows in ([], [0], [2999], [5, 5, 4, 2000, 7], range(3000)):
        store.fetch_ahead(np.array(rows, np.int64), writing)
    assert all(torch.equal(store[name], values) for name, values in before.items())


def test_a_fetched_record_faults_no_more(tmp_path):
    moments = Store("mmap", 2000, {"moments": ArrayLayout(2048, torch.float32)}, path=tmp_path / "t")

    def faults(rows, fetch):
        if fetch:
            moments.fetch_ahead(rows)
        before = resource.getrusage(resource.RUSAGE_THREAD)
        moments["moments"][:, 0].numpy()[rows] += 1
        after = resource.getrusage(resource.RUSAGE_THREAD)
        return after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt

    first, second, third = np.split(np.arange(1500), 3)
    faults(first, fetch=False)  # numpy has had its memory
    touched = faults(second, fetch=False)
    assert touched >= len(second)
    assert faults(third, fetch=True) < touched / 10


def test_of_a_record_a_part_can_be_fetched(tmp_path):
    store = Store("mmap", 500, {"first": ArrayLayout(1024, torch.float32), "last": ArrayLayout(2048, torch.float32)},
                  path=tmp_path / "t")  # fmt: skip
    rows = np.arange(500)
    store.fetch_ahead(rows, part=("last", slice(1024, 2048)))

    def faults(array, column):
        values = store[array][:, column].numpy()
        before = resource.getrusage(resource.RUSAGE_THREAD)
        values[rows] += 1
        after = resource.getrusage(resource.RUSAGE_THREAD)
        return after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt

    assert faults("last", 1024) < len(rows) / 10
    assert faults("last", 2047) < len(rows) / 10
    assert faults("first", 1023) >= len(rows)


def test_a_file_cut_short_under_a_store_is_an_error(tmp_path):
    with mock.patch.object(os, "unlink"):  # without a name nobody can cut it short, but a disk may fail
        store = Store("mmap", 20_000, LAYOUT, path=tmp_path / "t")
    (file,) = tmp_path.iterdir()
    os.truncate(file, 4096)
    store.fetch_ahead(np.array([0, 1, 50]))
    with pytest.raises(StoreError, match=r"table table: .*/t .*\(Bad address\)"):
        store.fetch_ahead(np.array([0, 1, 15_000]))


def test_a_rank_without_rows_has_a_store(tmp_path):
    assert Store("mmap", 0, LAYOUT, path=tmp_path / "t")["rows"].shape == (0, 6)


def test_random_values_are_a_function_of_seed_table_row_and_column():
    stream = counter_random.key(3, "layers.1.memory")
    whole = counter_random.normal_rows(0, 50, 7, stream, 0.5)
    assert np.array_equal(
        np.concatenate([counter_random.normal_rows(a, a + 10, 7, stream, 0.5) for a in range(0, 50, 10)]), whole
    )
    for other in (counter_random.key(4, "layers.1.memory"), counter_random.key(3, "layers.2.memory")):
        assert not np.any(counter_random.normal_rows(0, 50, 7, other, 0.5) == whole)
    draws = [splitmix64((int(stream) + (3 * (11 * 7 + 2) + k) * 0x9E3779B97F4A7C15) % 2**64) for k in range(3)]
    total = sum((bits >> shift) & 0xFFFF for bits in draws for shift in (0, 16, 32, 48))
    assert whole[11, 2] == np.float32(total - 393210) * np.float32(0.5 / 65536)


def test_random_values_are_normal():
    values = counter_random.normal_rows(10**9, 10**9 + 4000, 64, counter_random.key(0, "t"), 2.0)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 2) < 0.01
    assert abs((np.abs(values) < 2).mean() - 0.6827) < 0.005
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.01


def test_fill_streams_in_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "CHUNK_BYTES", 64)
    store, seen = Store("mmap", 23, LAYOUT, path=tmp_path / "t"), []

    def values(start, stop):
        seen.append((start, stop))
        return torch.arange(start, stop).float()[:, None].expand(-1, 6)

    store.fill("rows", values)
    assert seen == [(a, min(a + 5, 23)) for a in range(0, 23, 5)]
    assert torch.equal(store["rows"][:, 3], torch.arange(23).bfloat16())


def test_too_little_disk_is_refused_with_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(StoreError, match=r"table t: .*/table\.bin .*\b2\..*GiB .* 1\.00 GiB"):
        Store("mmap", 1 << 25, {"rows": ArrayLayout(32, torch.bfloat16)}, path=tmp_path / "table.bin", name="t")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_refused_and_cleaned_up(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"/table\.bin .* 0\.00 GiB \(\d+ bytes\) .*\bdisk\b"):
        Store("mmap", 10, LAYOUT, path=tmp_path / "table.bin")
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_mapped_file_are_reserved(tmp_path):
    blocks = []

    def reserve(descriptor, start, size):
        os_reserve(descriptor, start, size)
        blocks.append(os.fstat(descriptor).st_blocks)

    os_reserve = os.posix_fallocate
    with mock.patch.object(os, "posix_fallocate", reserve):
        store = Store("mmap", 4096, {"rows": ArrayLayout(64, torch.float32)}, path=tmp_path / "t")
    assert blocks[0] * 512 >= store.bytes


def test_a_mapped_file_has_no_name(tmp_path):
    """Two tables of one path do not meet, and nothing is left behind, whatever happens to the process."""
    one, two = (
        Store("mmap", 10 * size, {"rows": ArrayLayout(64, torch.float32)}, path=tmp_path / "t") for size in (100, 1)
    )
    one["rows"].fill_(1)
    two["rows"].fill_(2)
    assert (one["rows"] == 1).all()
    assert not list(tmp_path.iterdir())


def test_more_host_memory_than_there_is_is_refused():
    with pytest.raises(StoreError, match=r"^table table: .* 262144\.00 GiB .*host memory.*GiB"):
        Store("host", 1 << 40, {"rows": ArrayLayout(64, torch.float32)})


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"/none/t .*No such file"):
        Store("mmap", 4, LAYOUT, path=tmp_path / "none" / "t")


def test_rows_in_host_memory_have_huge_pages():
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("this system has no huge pages")
    store = Store("host", 1 << 16, {"rows": ArrayLayout(256, torch.float32), "moments": ArrayLayout(2, torch.float32)})
    assert not store["rows"].any()
    assert store["rows"].data_ptr() % 4096 == 0
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if ends := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(ends[1], 16) <= store["rows"].data_ptr() < int(ends[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            found += int(line.split()[1]) << 10
    assert found > store.bytes / 2
    store.close()
