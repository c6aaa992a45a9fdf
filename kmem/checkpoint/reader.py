"""Reading a checkpoint in one process without a process group, tensor by tensor, from mapped files."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kmem.checkpoint.commit import COMMIT_FILE, WEIGHT, Commit, saved_steps, step_folder
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.storage import entry_name
from kmem.config import Config, parse_config
from kmem.data.progress import Progress
from kmem.data.safetensors_file import TORCH_DTYPES
from kmem.data.tokenizer import tokenizer_record
from kmem.model.file_digest import file_digest
from kmem.model.mapped_rows import MappedRows, SafetensorsFile, Segment

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_SHOWN_BYTES = 1 << 30
"""Verifying more bytes than this takes long enough for a progress bar."""
_VERIFIED: set[tuple[Path, str, tuple[tuple[int, int], ...]]] = set()
"""(folder, digest of its commit file, sizes and times of change of its files) of the checkpoints that this process has
verified."""


class CheckpointReader:
    """The model tensors of a checkpoint under their canonical names, fp32 masters, unsharded.

    All files are opened at once, so that a training run that deletes the checkpoint meanwhile disturbs no reader.

    Args:
        path: a run folder (its newest complete and undamaged checkpoint is taken) or the folder of one step.
        verify: compare all files with their digests, once in a process.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.folder, (self.commit, self._opened, self._mapped) = first_sound(
            Path(path), lambda folder: _opened_files(folder, verify)
        )
        self.run_folder = self.folder.parent.parent
        self._verified = verify
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
        return CheckpointReader, (self.folder.absolute(), False)

    @cached_property
    def tokenizer_path(self) -> Path:
        """The tokenizer folder copied into the run folder when training began.

        Raises:
            CheckpointError: it is not the one that the checkpoint was trained with.
        """
        path, recorded = self.run_folder / "tokenizer", self.commit.progress.data
        if not (self._verified and path.is_dir()):
            return path
        found = tokenizer_record(path)
        for name, digest in recorded.get("tokenizer_files", {"tokenizer_config.json": None}).items():
            there = found["tokenizer_files"].get(name)
            if there is None or digest not in (None, there):
                raise self._other_tokenizer(path / name)
        if recorded.get("tokenizer", found["tokenizer"]) != found["tokenizer"]:
            raise self._other_tokenizer(path / "tokenizer.json")
        return path

    def _other_tokenizer(self, file: Path) -> CheckpointError:
        return CheckpointError(
            f"{file}: missing, or not that of the tokenizer that {self.folder} was trained with; restore it, for "
            "example from the folder of the prepared data"
        )

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
                entry = self._opened[file].get_slice(entry_name(key, first))
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
                Segment(self._mapped[file], entry_name(key, start))
                for start, _, file in sorted(self.commit.tensors[key].chunks)
            ]
            return MappedRows(name, dim, segments)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def find_checkpoint(path: Path) -> Path:
    """The folder of one step: `path` itself, or the newest under a run folder or its checkpoints folder. The contents
    of its files are not checked.

    Raises:
        CheckpointError: there is none.
    """
    return first_sound(path, Commit.read)[0]


def first_sound(path: Path, read: Callable[[Path], Result]) -> tuple[Path, Result]:
    """The folder of one step, and what `read` gives for it: of `path` itself, or of the newest folder under a run
    folder or its checkpoints folder for which `read` raises no CheckpointError. Newer ones are logged, unless the run
    has deleted them meanwhile; what it has saved meanwhile is looked at too.

    Raises:
        CheckpointError: there is none.
    """
    if (path / COMMIT_FILE).is_file():
        return path, read(path)
    for root in (path / "checkpoints", path):
        failed: dict[int, CheckpointError] = {}
        while left := [step for step in saved_steps(root) if step not in failed]:
            folder = step_folder(root, left[-1])
            try:
                return folder, read(folder)
            except CheckpointError as error:
                failed[left[-1]] = error
                if folder.exists():
                    log.warning("checkpoint passed over: %s", error)
        if failed:
            raise failed[min(failed)]
    exported = " (it is an exported Hugging Face folder)" if (path / "config.json").is_file() else ""
    raise CheckpointError(f"{path}: no complete checkpoint here{exported}; name a run folder or the folder of one step")


def _opened_files(folder: Path, verify: bool) -> tuple[Commit, dict[str, Any], dict[str, SafetensorsFile]]:
    """(the commit; each file, opened; each file, mapped)"""
    commit = Commit.read(folder)
    try:
        opened = {file: safe_open(folder / file, framework="pt") for file in commit.files}
        mapped = {file: SafetensorsFile(folder / file) for file in commit.files}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: there is no such file
        raise CheckpointError(f"{folder}: a file is not readable: {error}") from None
    if verify:
        _verify_once(folder, commit)
    return commit, opened, mapped


def _verify_once(folder: Path, commit: Commit) -> None:
    try:
        found = [(folder / file).stat() for file in commit.files]
        states = tuple((state.st_size, state.st_mtime_ns) for state in found)
        key = folder.resolve(), file_digest(folder / COMMIT_FILE), states
    except OSError as error:  # deleted by the run
        raise CheckpointError(f"{folder}: not readable: {error}") from None
    if key in _VERIFIED:
        return
    total = sum(file.bytes for file in commit.files.values())
    with ExitStack() as stack:
        shown = stack.enter_context(Progress(f"verifying {folder}", total)) if total > _SHOWN_BYTES else None
        commit.verify(folder, advance=(lambda size: None) if shown is None else shown.advance)
    _VERIFIED.add(key)
