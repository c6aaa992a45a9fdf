"""The JSON file that commits a checkpoint: it lists the saved tensors, their files and the files' digests.

It is written last. A folder is not a checkpoint if this file is missing, or does not match its own digest or the files
that it lists.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kmem.checkpoint.pieces import CheckpointError
from kmem.config.renamed import saved_commit
from kmem.data.safetensors_file import TORCH_DTYPES
from kmem.files import PARTIAL, atomic_write
from kmem.model.file_digest import file_digest

FORMAT = "kmem-checkpoint"
VERSION = 1
COMMIT_FILE = "checkpoint.json"
WEIGHT = "weight/"
"""Prefix of model tensors; optimizer moments have prefixes of their own."""
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class StoredTensor:
    """Where the intervals of one global 1-D tensor lie."""

    dtype: str
    """safetensors name, such as F32."""
    size: int
    chunks: list[tuple[int, int, str]]
    """(start, length, file) of each interval; its entry in the file is `name@start`. Gaps between intervals are blocks
    of a bank that the job does not hold."""

    @property
    def whole(self) -> bool:
        """Whether the intervals cover the whole tensor."""
        return sum(length for _, length, _ in self.chunks) == self.size


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Progress:
    """The state of a run that is not stored as tensors."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    """Training sequences consumed, over all selections of the text."""
    tokens: int
    """Trained tokens."""
    optimizer_steps: int
    """Updates that the Adam moments have accumulated; 0 without moments."""
    data: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of tokenizer and data order."""
    tracking: dict[str, Any] = field(default_factory=dict)
    """Identity of the tracked run."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Figures for people: losses, bits per byte, mesh, versions."""
    positions: dict[str, int] = field(default_factory=dict)
    """Selection of the text (`PreparedData.selection`) -> sequences read from it since the weights were new, or were
    taken from `checkpoint.start`. Each selection has its own order."""
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind of memory -> origin of its rows (`MemoryKind.origin`)."""

    @property
    def sequences_read(self) -> dict[str, int]:
        """`positions`. A checkpoint without any was trained on all text, whose selection is ""."""
        return self.positions or {"": self.consumed_samples}


@dataclass(frozen=True)
class Commit:
    """The content of a commit file."""

    progress: Progress
    config: dict[str, Any]
    """The resolved configuration of the run that saved it. Reading renames old keys to their current names."""
    shapes: dict[str, list[int]]
    """Canonical name -> shape of every model tensor."""
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind of memory -> what maps text to rows, where it is known: `NgramAddressing.to_manifest` for engram, the
    tree's tree.json for a bank. Rows are meaningless without it."""

    def write(self, folder: Path) -> None:
        """Write the commit file into a folder whose other files are complete and durable."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["digest"] = _digest(body)
        atomic_write(folder / COMMIT_FILE, json.dumps(body, separators=(",", ":")))

    @classmethod
    def read(cls, folder: Path) -> "Commit":
        """Read and check the commit file and the sizes of the files it names.

        Raises:
            CheckpointError: missing, damaged, of another format version, or a file is missing or has another size.
        """
        path = folder / COMMIT_FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: no {COMMIT_FILE}: not a checkpoint, or one whose save did not finish"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a {FORMAT} file")
        if body.get("version") != VERSION:
            raise CheckpointError(f"{path}: format version {body.get('version')}, this kmem reads version {VERSION}")
        stated = body.pop("digest", None)
        if stated != _digest(body):
            raise CheckpointError(f"{path}: damaged: its content does not match its own digest")
        try:
            commit = TypeAdapter(cls).validate_python(saved_commit(body))
            commit._check()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path}: not a commit that kmem wrote: {where}: {first['msg']}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a commit that kmem wrote: {error}") from None
        for name, file in commit.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                raise CheckpointError(f"{folder / name}: missing") from None
            if size != file.bytes:
                raise CheckpointError(f"{folder / name}: truncated: {size} bytes instead of {file.bytes}")
        return commit

    def _check(self) -> None:
        """Check what a digest does not tell: a file may have been written by hand.

        Raises:
            ValueError: names the entry.
        """
        for name in self.files:
            if Path(name).name != name:
                raise ValueError(f"files: {name!r} is not a name within the folder")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in TORCH_DTYPES:
                raise ValueError(f"tensors: {name} has dtype {tensor.dtype!r}")
            intervals = sorted((start, start + length) for start, length, _ in tensor.chunks)
            bounds = [(0, 0), *intervals, (tensor.size, tensor.size)]
            if any(one[1] > other[0] or one[0] > one[1] for one, other in pairwise(bounds)):
                raise ValueError(f"tensors: the intervals of {name} overlap or leave its {tensor.size} elements")
            absent = {file for _, _, file in tensor.chunks} - self.files.keys()
            if absent:
                raise ValueError(f"tensors: {name} lies in {min(absent)!r}, which is not listed")
        for name, shape in self.shapes.items():
            stored = self.tensors.get(WEIGHT + name)
            if stored is None or min(shape, default=0) < 0 or prod(shape) != stored.size:
                raise ValueError(f"shapes: {name} has {shape}, and its tensor {stored and stored.size} elements")

    def verify(
        self, folder: Path, share: int = 0, shares: int = 1, advance: Callable[[int], object] = lambda size: None
    ) -> None:
        """Compare file contents with their digests. Several callers can divide the files: each checks part `share` of
        `shares`.

        Args:
            advance: called with the size of every file that was read.

        Raises:
            CheckpointError: names the damaged file.
        """
        for name in sorted(self.files)[share::shares]:
            try:
                digest = file_digest(folder / name)
            except OSError as error:
                raise CheckpointError(f"{folder / name}: not readable: {error}") from None
            if digest != self.files[name].sha256:
                raise CheckpointError(f"{folder / name}: damaged: its content does not match its digest")
            advance(self.files[name].bytes)


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder under `root`, ascending, with or without a commit file."""
    if not root.is_dir():
        return []
    matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def committed_steps(root: Path) -> list[int]:
    """Steps under `root` that have a commit file, ascending; their content is not checked."""
    return [step for step in saved_steps(root) if (step_folder(root, step) / COMMIT_FILE).is_file()]


def unfinished_folders(root: Path) -> list[Path]:
    """Leftovers of interrupted saves and deletions under `root`: temporary folders and steps without a commit file."""
    return [
        entry
        for entry in root.iterdir()
        if (_STEP_FOLDER.fullmatch(entry.name.removesuffix(PARTIAL)) and not (entry / COMMIT_FILE).is_file())
        or (entry.name.endswith(PARTIAL) and _STEP_FOLDER.match(entry.name))
    ]


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in body.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
