"""A checkpoint written again with some of its values changed, an entry of its files at a time."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.commit import Commit, Progress, StoredFile, step_folder
from kmem.checkpoint.pieces import CHUNK_ELEMENTS
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.storage import entry_name
from kmem.checkpoint.writer import FILE_BYTES
from kmem.config import Config, dump_config, parse_config
from kmem.data.progress import Progress as ProgressBar
from kmem.data.safetensors_file import TORCH_DTYPES, SafetensorsWriter
from kmem.files import atomic_folder
from kmem.model.bank_export import TREE_FOLDER

Edit = Callable[[str, int, Tensor], Tensor]
"""(what is stored, such as `weight/NAME`; the first element; values 1-D) -> values of the same type and length."""


def rewrite_run(
    source: CheckpointReader,
    out: Path,
    note: str,
    edit: Edit,
    progress: Progress | None = None,
    config: Config | None = None,
) -> Path:
    """A new run folder with one checkpoint, a copy of `source` whose values have passed through `edit`; with the
    tokenizer and the tree, and a configuration of its own name. It appears when it is complete.

    Args:
        out: a folder that does not exist or is empty.
        note: what was done, which the facts of the new checkpoint say.
        progress: of the new checkpoint, but for the note; default: that of `source`.
        config: its configuration, but for name and folder; default: that of `source`.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    out = out.resolve()
    stands = source.commit.progress if progress is None else progress
    before = stands.facts.get("edited")
    facts = {**stands.facts, "edited": note if before is None else f"{before}; {note}"}
    stands = replace(stands, facts=facts, tracking={})
    config = source.config if config is None else config
    config = parse_config({**config.model_dump(mode="json"), "name": out.name, "folder": str(out.parent)})
    with atomic_folder(out) as partial:
        (partial / "checkpoints").mkdir(parents=True)
        folder = _write(source, partial / "checkpoints", stands, config, edit)
        (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        for name in ("tokenizer", TREE_FOLDER):
            if (source.run_folder / name).is_dir():
                shutil.copytree(source.run_folder / name, partial / name)
    return out / folder.relative_to(partial)


def _write(source: CheckpointReader, root: Path, progress: Progress, config: Config, edit: Edit) -> Path:
    commit, folder = _completed(source.commit), step_folder(root, progress.step)
    folder.mkdir()
    files: dict[str, StoredFile] = {}
    entries = _entries_by_file(commit)
    total = sum(length for found in entries.values() for _, _, length in found)
    held = {(key, start) for key, tensor in source.commit.tensors.items() for start, _, _ in tensor.chunks}
    with ProgressBar(f"writing {folder.name}", total) as bar:
        for file, found in entries.items():
            # The widest types come first, so that every entry is aligned.
            found = sorted(found, key=lambda entry: -TORCH_DTYPES[commit.tensors[entry[0]].dtype].itemsize)
            declared = {
                entry_name(key, start): ((length,), TORCH_DTYPES[commit.tensors[key].dtype])
                for key, start, length in found
            }
            with SafetensorsWriter(folder / file, declared) as writer:
                for key, start, length in found:
                    if (key, start) in held:
                        values = source.read_stored(key, start, start + length)
                    else:
                        values = torch.zeros(length, dtype=TORCH_DTYPES[commit.tensors[key].dtype])
                    writer.write(entry_name(key, start), edit(key, start, values))
                    bar.advance(length)
            files[file] = StoredFile(writer.size, writer.sha256)
    changed: Mapping[str, Any] = {"progress": progress, "config": config.model_dump(mode="json"), "files": files}
    replace(commit, **changed).write(folder)
    return folder


def _completed(commit: Commit) -> Commit:
    """With entries, in files of their own, for what the checkpoint of a part does not hold."""
    tensors, size, number = dict(commit.tensors), 0, 0
    for key, tensor in commit.tensors.items():
        if tensor.whole:
            continue
        chunks, place = list(tensor.chunks), 0
        for start, length, _ in [*sorted(tensor.chunks), (tensor.size, 0, "")]:
            for first in range(place, start, CHUNK_ELEMENTS):
                added = min(CHUNK_ELEMENTS, start - first)
                size += added * TORCH_DTYPES[tensor.dtype].itemsize
                if size > FILE_BYTES:
                    size, number = 0, number + 1
                chunks.append((first, added, f"added-{number:05d}.safetensors"))
            place = start + length
        tensors[key] = replace(tensor, chunks=sorted(chunks))
    return replace(commit, tensors=tensors)


def _entries_by_file(commit: Commit) -> dict[str, list[tuple[str, int, int]]]:
    """File -> (what is stored, first element, length) of its entries."""
    found: dict[str, list[tuple[str, int, int]]] = {file: [] for file in commit.files}
    for key, tensor in commit.tensors.items():
        for start, length, file in tensor.chunks:
            found.setdefault(file, []).append((key, start, length))
    return found
