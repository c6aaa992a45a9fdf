"""Write a safetensors file from front to back in bounded memory.

The `safetensors` library writes a file from a dict that holds every tensor at once. Here the header is computed from
declared shapes; then tensors (or slices of them) are appended one at a time, so a file may be larger than host memory.
Reading needs no such code: `safetensors.safe_open` maps the file and slices it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from kmem.config import UserError
from kmem.files import FULL_DISK, AtomicFile

Item = TypeVar("Item")

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> its name in a safetensors header."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

SLICE_BYTES = 64 << 20  # a tensor is moved to the host and hashed in slices of this size


class SafetensorsWriter(AtomicFile):
    """Writes `path` as an `AtomicFile`, which gets its name once every declared tensor is written.

    As a context manager it closes the file at the end of the block and removes it if the block raises: a file with the
    final name is always complete.

    Args:
        path: the finished file. Its folder exists.
        tensors: name -> (shape, dtype), in the order in which they will be written.
        metadata: text stored under `__metadata__`.

    Raises:
        ValueError: a dtype is unknown, or a tensor would start at an offset that is not a multiple of its item size
            (declare wider dtypes first).
        UserError: the disk is full or the file cannot be created.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        assert sys.byteorder == "little", "safetensors are little-endian"
        self._missing = {name: (tuple(shape), dtype) for name, (shape, dtype) in tensors.items()}
        self._values = 0  # values written so far of the first tensor that is not complete
        self._hash = hashlib.sha256()
        header, data_bytes = _header(self._missing, metadata)
        self.size = len(header) + data_bytes
        """Bytes of the finished file."""
        self.sha256: str
        """Hexadecimal SHA-256 digest of the finished file; only after the block."""
        self._written = 0
        try:
            super().__init__(Path(path), buffering=0)
        except OSError as error:
            raise self._explain(error) from error
        self._append(header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a whole tensor; it must be the next one declared, with the declared shape and dtype, on any device."""
        shape, dtype = self._expect(name)
        if tuple(tensor.shape) != shape or self._values:
            raise ValueError(
                f"{name}: declared {list(shape)} {dtype} with {self._values} values written, got {list(tensor.shape)}"
            )
        self.write_values(name, tensor)

    def write_values(self, name: str, values: torch.Tensor) -> None:
        """Append values of any shape to the next declared tensor, in row-major order, such as parts of rows that are
        too long to hold. The tensor is complete after its last value."""
        shape, dtype = self._expect(name)
        size = prod(shape)
        if values.dtype != dtype or self._values + values.numel() > size:
            raise ValueError(
                f"{name}: {self._values} of {size} values of {dtype} are written, got {values.numel()} more of "
                f"{values.dtype}"
            )
        for part in values.detach().reshape(-1).split(SLICE_BYTES // dtype.itemsize):
            self._append(part.cpu().view(torch.uint8).numpy().data)
        self._values += values.numel()
        if self._values == size:
            del self._missing[name]
            self._values = 0

    def commit(self) -> None:
        """Flush to the disk and give the file its name.

        Raises:
            ValueError: declared tensors are missing; the file is removed.
            UserError: the disk is full.
        """
        if self._missing:
            self.discard()
            missing = list(self._missing)
            raise ValueError(f"{self.path}: {len(missing)} declared tensors were not written, first {missing[0]}")
        assert self._written == self.size
        try:
            super().commit()
        except OSError as error:
            raise self._explain(error) from error
        self.sha256 = self._hash.hexdigest()

    def _expect(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        due = next(iter(self._missing), None)
        if name != due:
            raise ValueError(f"{self.path}: the next declared tensor is {due}, got {name}")
        return self._missing[name]

    def _append(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        self._hash.update(rest)
        try:
            while rest:  # an unbuffered write may write less than it is given
                count = self.stream.write(rest)
                self._written += count
                rest = rest[count:]
        except OSError as error:
            self.discard()
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> UserError:
        if error.errno in FULL_DISK:
            return UserError(
                f"{self.path}: no space left: the file needs {self.size} bytes and {self._written} were written; "
                "free space or choose another folder"
            )
        return UserError(f"{self.path}: cannot be written: {error.strerror}")


def in_files(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """Divide items, in their order, among files of at most `limit` bytes; a file is larger only if a single item is."""
    files: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if files[-1] and filled + size(item) > limit:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += size(item)
    return files


def refuse_pickled(folder: Path, model_class: str) -> None:
    """Explain a folder without safetensors, if its weights are pickled.

    Args:
        model_class: the class of Transformers that converts them.

    Raises:
        UserError: the folder has weights that only unpickling would read; says how to convert them.
    """
    pickled = sorted(file for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{pickled[0]}: kmem does not unpickle weights, since unpickling can run any code; if you trust the "
            f"folder, convert them: python -c 'from transformers import {model_class}; "
            f'{model_class}.from_pretrained("{folder}").save_pretrained("{folder}")\''
        )


def _header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None
) -> tuple[bytes, int]:
    """(The file's first bytes: length, JSON and padding; the number of data bytes that follow.)"""
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    offset = 0
    for name, (shape, dtype) in tensors.items():
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: safetensors has no {dtype}")
        if offset % dtype.itemsize:
            raise ValueError(f"{name}: {dtype} would start at byte {offset}; declare wider dtypes first")
        end = offset + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, offset
