"""Storage of `torch.distributed.checkpoint` on safetensors files and one JSON commit file: nothing is pickled."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from kmem.checkpoint.commit import Commit, StoredFile, StoredTensor
from kmem.checkpoint.pieces import NotFiniteError, index_key
from kmem.data.safetensors_file import DTYPE_NAMES, TORCH_DTYPES, SafetensorsWriter


def entry_name(tensor: str, start: int) -> str:
    """Name of an interval inside its safetensors file."""
    return f"{tensor}@{start}"


def write_entries(path: Path, sizes: Mapping[str, tuple[int, torch.dtype]], values: Callable[[str], Any]) -> StoredFile:
    """Write a file of 1-D entries, name -> (length, dtype). `values` gives the tensor of one entry at a time, which may
    be a copy. The widest types come first, so that every entry is aligned.

    Raises:
        NotFiniteError: a value is NaN or infinite.
    """
    order = sorted(sizes, key=lambda name: -sizes[name][1].itemsize)
    with SafetensorsWriter(path, {name: ((sizes[name][0],), sizes[name][1]) for name in order}) as writer:
        for name in order:
            writer.write(name, finite(name, values(name)))
    return StoredFile(writer.size, writer.sha256)


def finite(name: str, values: Tensor) -> Tensor:
    """The same values, unless one is NaN or infinite: such states are not stored. One pass, on their device.

    Raises:
        NotFiniteError: names the tensor.
    """
    if not values.is_floating_point() or not values.numel():
        return values
    if not all(math.isfinite(end) for end in values.aminmax()):
        bad = values.numel() - int(torch.isfinite(values).sum())
        raise NotFiniteError(
            f"{name}: {bad:,} of {values.numel():,} values are not finite (NaN or infinite), so they are not stored"
        )
    return values


class _Stateless:
    """What torch asks of both a storage writer and a reader, and these need not do."""

    def reset(self, checkpoint_id=None) -> None:
        """Nothing is kept between saves or loads."""

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class SafetensorsStorageWriter(_Stateless, StorageWriter):
    """Each rank writes one file; the coordinator then commits.

    Args:
        folder: an empty folder, the same on all ranks.
        rank: this rank; its number is part of the file name.
        commit: called on the coordinator with the stored tensors and files, after every rank's data is durable.
    """

    def __init__(
        self, folder: Path, rank: int, commit: Callable[[dict[str, StoredTensor], dict[str, StoredFile]], None]
    ):
        self.folder = folder
        self.rank = rank
        self.commit = commit

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The folder exists already."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        results: list[WriteResult] = []
        if plan.items:
            entries = {entry_name(*index_key(item.index)): item for item in plan.items}
            sizes: dict[str, tuple[int, torch.dtype]] = {}
            for name, item in entries.items():
                assert item.tensor_data is not None, "Pieces hold tensors only"
                sizes[name] = (item.tensor_data.chunk.sizes.numel(), item.tensor_data.properties.dtype)
            path = self.folder / f"part-{self.rank:05d}.safetensors"
            stored = (path.name, write_entries(path, sizes, lambda name: planner.resolve_data(entries[name])))
            results = [
                WriteResult(item.index, sizes[name][0] * sizes[name][1].itemsize, stored)
                for name, item in entries.items()
            ]
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for rank_results in results for result in rank_results]
        files: dict[str, StoredFile] = dict(result.storage_data for result in written)
        where = {index_key(result.index): result.storage_data[0] for result in written}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            chunks = [(chunk.offsets[0], chunk.sizes[0]) for chunk in stored.chunks]
            tensors[name] = StoredTensor(
                dtype=DTYPE_NAMES[stored.properties.dtype],
                size=stored.size[0],
                chunks=[(start, length, where[name, start]) for start, length in sorted(chunks)],
            )
        self.commit(tensors, files)


class SafetensorsStorageReader(_Stateless, StorageReader):
    """Reads a committed folder; rebuilds the metadata that torch needs from the commit file."""

    def __init__(self, folder: Path, commit: Commit):
        self.folder = folder
        self.commit = commit

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=TORCH_DTYPES[tensor.dtype]),
                    torch.Size([tensor.size]),
                    [ChunkStorageMetadata(torch.Size([start]), torch.Size([n])) for start, n, _ in tensor.chunks],
                )
                for name, tensor in self.commit.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Files are opened when they are read."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list] = {}
        files = {
            (name, start): file for name, tensor in self.commit.tensors.items() for start, _, file in tensor.chunks
        }
        for item in plan.items:
            by_file.setdefault(files[index_key(item.storage_index)], []).append(item)
        for file, items in sorted(by_file.items()):
            with safe_open(self.folder / file, framework="pt") as stored:
                for item in items:
                    name, start = index_key(item.storage_index)
                    first = item.storage_offsets[0]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored.get_slice(entry_name(name, start))[first : first + item.lengths[0]])
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future
