"""`kmem verify`: compare the files of a folder that kmem wrote with their digests."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kmem.config import UserError
from kmem.wording import counted

Found = tuple[Path, Callable[[], str]]
"""(folder, a function that verifies it and says what was compared)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run, step of a run, prepared data, export, or tree"
    )


def run(arguments: argparse.Namespace) -> int:
    """Verify all folders; 2 if anything is damaged."""
    damaged = 0
    for folder in arguments.folders:
        for found, verify in _contents(folder):
            try:
                print(f"{found}: sound, {verify()}", flush=True)
            except UserError as error:
                if not found.exists():  # a run purges its checkpoints
                    print(f"{found}: deleted meanwhile", flush=True)
                else:
                    print(f"{found}: DAMAGED: {error}", flush=True)
                    damaged += 1
    return 2 if damaged else 0


def _contents(folder: Path) -> Iterator[Found]:
    from kmem.data.manifest import MANIFEST_NAME

    steps: list[Path] = []
    # Checkpoints, exports and trees import PyTorch, which takes 2 s of CPU time; data does without.
    if any(any(folder.glob(names)) for names in ("step-*", "checkpoint*")):
        from kmem.checkpoint.commit import COMMIT_FILE, saved_steps, step_folder

        roots = (folder, folder / "checkpoints")
        steps = [step_folder(root, step) for root in roots for step in saved_steps(root)]
        steps += [folder] * (folder / COMMIT_FILE).is_file()
        yield from ((step, partial(_checkpoint, step)) for step in steps)
    if (folder / MANIFEST_NAME).is_file():
        yield folder, partial(_data, folder)
        return
    from kmem.checkpoint.commit import COMMIT_FILE
    from kmem.hf.digests import DIGESTS_FILE
    from kmem.model.bank_tree import TREE_FILE

    for name, verify in ((DIGESTS_FILE, _export), (TREE_FILE, _tree)):
        if (folder / name).is_file():
            yield folder, partial(verify, folder)
            return
    if not steps:
        raise UserError(
            f"{folder}: no digests here: not a run, a step of a run ({COMMIT_FILE}), prepared data ({MANIFEST_NAME}), "
            f"an export ({DIGESTS_FILE}) or a tree ({TREE_FILE})"
        )


def _checkpoint(folder: Path) -> str:
    from kmem.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(folder)
    beside = ", and its tokenizer" if reader.tokenizer_path.is_dir() else ""
    return _said(len(reader.commit.files), sum(file.bytes for file in reader.commit.files.values())) + beside


def _data(folder: Path) -> str:
    from kmem.data.manifest import read_manifest
    from kmem.data.tokenizer import check_tokenizer
    from kmem.data.verified_files import verify_files

    manifest = read_manifest(folder)
    verify_files(folder, manifest.files, anew=True)
    check_tokenizer(folder, manifest)
    return _said(len(manifest.files), sum(file.bytes for file in manifest.files.values())) + ", and its tokenizer"


def _export(folder: Path) -> str:
    from kmem.hf.digests import verify_export

    return counted(verify_export(folder, every=True), "file")


def _tree(folder: Path) -> str:
    from kmem.model.bank_tree import EMBEDDER_FOLDER, read_tree_record
    from kmem.model.file_digest import file_digest

    try:
        record = read_tree_record(folder)
        files = record["files"] | {
            f"{EMBEDDER_FOLDER}/{name}": sha for name, sha in record["embedder"]["files"].items()
        }
        for name, digest in files.items():
            if file_digest(folder / name) != digest:
                raise ValueError(f"{folder / name}: its content does not match its digest")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    return counted(len(files), "file")


def _said(files: int, size: int) -> str:
    return f"{counted(files, 'file')} of {size / 1e6:,.1f} MB"
