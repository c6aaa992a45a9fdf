"""Reading a checkpoint in one process without a process group, tensor by tensor, from mapped files."""

import logging
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kmem.checkpoint.commit import COMMIT_FILE, Commit, committed_steps, step_folder
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.storage import entry_name
from kmem.config import Config, parse_config
from kmem.data.safetensors_file import TORCH_DTYPES
from kmem.model.mapped_rows import MappedRows, SafetensorsFile, Segment

log = logging.getLogger(__name__)

WEIGHT = "weight/"
"""Prefix of model tensors; optimizer moments have prefixes of their own."""


class CheckpointReader:
    """The model tensors of a checkpoint under their canonical names, fp32 masters, unsharded.

    Args:
        path: a run folder (its newest complete checkpoint is taken) or the folder of one step.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """

    def __init__(self, path: str | Path):
        self.folder = find_checkpoint(Path(path))
        self.run_folder = self.folder.parent.parent
        self.commit = Commit.read(self.folder)
        folder = self.folder
        # Files stay open: a model has many more tensors than files.
        self._opened = cache(lambda file: safe_open(folder / file, framework="pt"))
        self._mapped = cache(lambda file: SafetensorsFile(folder / file))
        self.config: Config = parse_config(self.commit.config)
        self.step = self.commit.progress.step
        self.facts = {
            "step": self.step,
            "tokens": self.commit.progress.tokens,
            "consumed_samples": self.commit.progress.consumed_samples,
            **self.commit.progress.facts,
        }
        self.tensors = {
            name: torch.empty(shape, dtype=TORCH_DTYPES[self.commit.tensors[WEIGHT + name].dtype], device="meta")
            for name, shape in self.commit.shapes.items()
        }
        """Canonical name -> the shape and dtype of each model tensor."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointReader, (self.folder.absolute(),)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer folder copied into the run folder when training began."""
        return self.run_folder / "tokenizer"

    @property
    def addressing(self) -> dict[str, Any] | None:
        """Manifest of the n-gram addressing that the engram was trained with; None without engram."""
        return self.commit.manifests.get("engram")

    @property
    def tree(self) -> str | None:
        """Fingerprint of the cluster tree that the bank was trained with; None if it is unknown."""
        tree = self.commit.manifests.get("bank")
        return None if tree is None else str(tree["fingerprint"])

    def verify(self) -> None:
        """Compare all files with their digests."""
        self.commit.verify(self.folder)

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.tensors[name].shape
        return self.read_stored(WEIGHT + name, 0, prod(shape)).view(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along the first dimension."""
        shape = self.tensors[name].shape
        width = prod(shape[1:])
        return self.read_stored(WEIGHT + name, start * width, stop * width).view(stop - start, *shape[1:])

    def read_stored(self, key: str, start: int, stop: int, absent: float | None = None) -> Tensor:
        """Elements [start, stop) of any stored tensor, such as `weight/NAME` or an optimizer moment.

        Args:
            absent: value of elements that a partial checkpoint does not hold.

        Raises:
            CheckpointError: it does not hold them, and `absent` is None.
        """
        stored = self.commit.tensors[key]
        out = torch.empty(stop - start, dtype=TORCH_DTYPES[stored.dtype])
        if absent is not None:
            out.fill_(absent)
        held = 0
        for first, length, file in stored.chunks:
            low, high = max(first, start), min(first + length, stop)
            if low < high:
                entry = self._opened(file).get_slice(entry_name(key, first))
                out[low - start : high - start] = entry[low - first : high - first]
                held += high - low
        if held < stop - start and absent is None:
            raise self._in_part(key)
        return out

    def check_whole(self) -> None:
        """Refuse a partial checkpoint.

        Raises:
            CheckpointError: it does not hold all blocks of its bank.
        """
        for key, stored in self.commit.tensors.items():
            if not stored.whole:
                raise self._in_part(key)

    def _in_part(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: holds only a part of {key.partition('/')[2]}: its job keeps the blocks of its subtrees "
            "(bank.hold=subtrees); join it with the other parts with kmem bank merge, and name the result"
        )

    def row_width(self, key: str) -> int | None:
        """Elements per row of a stored tensor, such as `weight/NAME` of a table or its optimizer moments; None for one
        number per table, such as the optimizer's step."""
        width, rest = divmod(self.commit.tensors[key].size, self.tensors[key.partition("/")[2]].shape[0])
        return None if rest else width

    def map_rows(self, name: str, kind: str = WEIGHT) -> MappedRows:
        """A tensor [R, D] whose rows stay in the checkpoint's files until they are fetched.

        Args:
            kind: prefix of the stored tensor: `weight/`, or the prefix of an optimizer moment.

        Raises:
            CheckpointError: a file is missing or damaged, or the checkpoint holds only a part of the tensor.
        """
        key = kind + name
        dim = self.row_width(key)
        assert dim is not None, f"{key} has no rows"
        if not self.commit.tensors[key].whole:
            raise self._in_part(key)
        try:
            segments = [
                Segment(self._mapped(file), entry_name(key, start))
                for start, _, file in sorted(self.commit.tensors[key].chunks)
            ]
            return MappedRows(name, dim, segments)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def find_checkpoint(path: Path) -> Path:
    """The folder of one step: `path` itself, or the newest under a run folder or its checkpoints folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / COMMIT_FILE).is_file():
        return path
    for root in (path / "checkpoints", path):
        damaged = None
        for step in reversed(committed_steps(root)):
            try:
                Commit.read(step_folder(root, step))
            except CheckpointError as error:
                log.warning("checkpoint passed over: %s", error)
                damaged = error
                continue
            return step_folder(root, step)
        if damaged is not None:
            raise damaged
    exported = " (it is an exported Hugging Face folder)" if (path / "config.json").is_file() else ""
    raise CheckpointError(f"{path}: no complete checkpoint here{exported}; name a run folder or the folder of one step")
