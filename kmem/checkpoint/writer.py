"""Writing a checkpoint without optimizer state in one process, tensor by tensor: the counterpart of CheckpointReader.

Training saves through CheckpointStore, which needs a process group and the whole sharded state. A converter has
neither: it streams tensors that may be larger than host memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.commit import WEIGHT, Commit, Progress, StoredFile, StoredTensor, step_folder
from kmem.checkpoint.pieces import CHUNK_ELEMENTS
from kmem.checkpoint.storage import entry_name, finite
from kmem.config import Config
from kmem.data.safetensors_file import DTYPE_NAMES, SafetensorsWriter, in_files
from kmem.files import atomic_folder

FILE_BYTES = 4 << 30  # ranks divide the files of a checkpoint among them to verify it


def write_weights(
    root: Path,
    progress: Progress,
    config: Config,
    shapes: Mapping[str, Sequence[int]],
    parts: Callable[[str], Iterable[Tensor]],
    manifests: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write a checkpoint without optimizer moments, under a temporary name, committed last.

    Args:
        root: folder of the run's checkpoints.
        progress: where the run stands; `step` names the folder.
        config: the run's configuration.
        shapes: canonical name -> shape of every model tensor, as fp32 masters.
        parts: for a name, consecutive fp32 parts of the tensor in row-major order, of any sizes.
        manifests: `Commit.manifests`.

    Raises:
        UserError: the checkpoint exists already, or the folder cannot be written.
        ValueError: the parts of a tensor have more or fewer elements than its shape.
    """
    final = step_folder(root, progress.step)
    with atomic_folder(final) as partial:
        tensors: dict[str, StoredTensor] = {}
        files: dict[str, StoredFile] = {}
        groups = in_files(shapes, lambda name: prod(shapes[name]) * torch.float32.itemsize, FILE_BYTES)
        for number, names in enumerate(groups):
            file = f"part-{number:05d}.safetensors"
            for name in names:
                size = prod(shapes[name])
                chunks = [(start, min(CHUNK_ELEMENTS, size - start), file) for start in range(0, size, CHUNK_ELEMENTS)]
                tensors[WEIGHT + name] = StoredTensor(DTYPE_NAMES[torch.float32], size, chunks)
            declared = {
                entry_name(WEIGHT + name, start): ((length,), torch.float32)
                for name in names
                for start, length, _ in tensors[WEIGHT + name].chunks
            }
            with SafetensorsWriter(partial / file, declared) as writer:
                for name in names:
                    _append(writer, WEIGHT + name, prod(shapes[name]), parts(name))
            files[file] = StoredFile(writer.size, writer.sha256)
        model_shapes = {name: list(shape) for name, shape in shapes.items()}
        dumped = config.model_dump(mode="json")
        Commit(progress, dumped, model_shapes, tensors, files, dict(manifests or {})).write(partial)
    return final


def _append(writer: SafetensorsWriter, tensor: str, size: int, parts: Iterable[Tensor]) -> None:
    """Write consecutive parts, cut at the borders of the entries."""
    done, more = 0, False
    for part in parts:
        flat = part.reshape(-1)
        more = done + len(flat) > size
        if more:
            break
        while len(flat):
            start = done - done % CHUNK_ELEMENTS
            values = finite(tensor, flat[: start + CHUNK_ELEMENTS - done])
            writer.write_values(entry_name(tensor, start), values)
            flat, done = flat[len(values) :], done + len(values)
    if more or done != size:
        raise ValueError(f"{tensor} has {size} elements, its parts have {'more' if more else done}")
