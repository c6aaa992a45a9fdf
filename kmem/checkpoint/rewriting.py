"""Copying a checkpoint with some of its values changed, one entry of its files at a time."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kmem.checkpoint.commit import Commit, Progress, step_folder
from kmem.checkpoint.pieces import CHUNK_ELEMENTS
from kmem.checkpoint.reader import CheckpointReader
from kmem.checkpoint.storage import entry_name, write_entries
from kmem.checkpoint.writer import FILE_BYTES
from kmem.config import Config, dump_config, parse_config
from kmem.data.progress import Progress as ProgressBar
from kmem.data.safetensors_file import TORCH_DTYPES, in_files
from kmem.files import atomic_folder
from kmem.model.bank_export import TREE_FOLDER

Edit = Callable[[str, int, Tensor], Tensor]
"""(stored tensor, such as `weight/NAME`; first element; 1-D values) -> values of the same dtype and length."""


def rewrite_run(
    source: CheckpointReader,
    out: Path,
    note: str,
    edit: Edit,
    progress: Progress | None = None,
    config: Config | None = None,
) -> Path:
    """Write a new run folder with one checkpoint, a copy of `source` whose values have passed through `edit`. The
    tokenizer and the tree are copied, and the configuration gets the new name. The folder appears once it is complete.

    Args:
        out: a folder that does not exist or is empty.
        note: what was done; it is added to the facts of the new checkpoint.
        progress: progress of the new checkpoint, without the note; default: as in `source`.
        config: configuration of the new run; name and folder follow from `out`; default: as in `source`.

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
        folder = step_folder(partial / "checkpoints", stands.step)
        folder.mkdir(parents=True)
        _write(source, folder, stands, config, edit)
        (partial / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        for name in ("tokenizer", TREE_FOLDER):
            if (source.run_folder / name).is_dir():
                shutil.copytree(source.run_folder / name, partial / name)
    return out / folder.relative_to(partial)


def _write(source: CheckpointReader, folder: Path, progress: Progress, config: Config, edit: Edit) -> None:
    commit = _completed(source.commit)
    entries: dict[str, tuple[str, int, int]] = {}  # name -> stored tensor, first element, length
    by_file: dict[str, dict[str, tuple[int, torch.dtype]]] = {file: {} for file in commit.files}
    for key, tensor in commit.tensors.items():
        for start, length, file in tensor.chunks:
            entries[entry_name(key, start)] = (key, start, length)
            by_file.setdefault(file, {})[entry_name(key, start)] = (length, TORCH_DTYPES[tensor.dtype])
    with ProgressBar(f"writing {folder.name}", sum(length for _, _, length in entries.values())) as bar:

        def edited(name: str) -> Tensor:
            key, start, length = entries[name]
            bar.advance(length)
            return edit(key, start, source.read_stored(key, start, start + length, absent=0))

        files = {file: write_entries(folder / file, sizes, edited) for file, sizes in by_file.items()}
    replace(commit, progress=progress, config=config.model_dump(mode="json"), files=files).write(folder)


def _completed(commit: Commit) -> Commit:
    """The commit with entries added, in new files, for everything that a partial checkpoint does not hold."""
    holes = []
    for key, tensor in commit.tensors.items():
        place = 0
        for start, length, _ in [*sorted(tensor.chunks), (tensor.size, 0, "")]:
            holes += [(key, first, min(CHUNK_ELEMENTS, start - first)) for first in range(place, start, CHUNK_ELEMENTS)]
            place = start + length
    chunks = {key: list(tensor.chunks) for key, tensor in commit.tensors.items()}
    files = in_files(holes, lambda hole: hole[2] * TORCH_DTYPES[commit.tensors[hole[0]].dtype].itemsize, FILE_BYTES)
    for number, added in enumerate(files):
        for key, first, length in added:
            chunks[key].append((first, length, f"added-{number:05d}.safetensors"))
    tensors = {key: replace(tensor, chunks=sorted(chunks[key])) for key, tensor in commit.tensors.items()}
    return replace(commit, tensors=tensors)
