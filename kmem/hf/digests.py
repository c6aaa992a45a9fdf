"""The digests of an export: what its files were when they were written."""

import json
from pathlib import Path

from kmem.config import UserError
from kmem.files import read_json
from kmem.hf.folder import GENERATION_FILE
from kmem.model.file_digest import file_digest

DIGESTS_FILE = "digests.json"
FORMAT = "kmem-export-digests"
_EDITABLE = ("README.md", DIGESTS_FILE)
_DECIDING = (".safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", ".index.json")
"""Ends of the names of files that decide what a model computes. Who edits one on purpose removes the digests."""


def write_digests(folder: Path) -> None:
    """Write the digests of all files of a folder but its model card. Call it last."""
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _EDITABLE and not path.name.startswith(".")
    }
    text = json.dumps({"format": FORMAT, "version": 1, "sha256": files}, indent=2)
    (folder / DIGESTS_FILE).write_text(text + "\n", encoding="utf-8")


def verify_export(folder: Path, every: bool = False) -> int:
    """Compare the files of an export with their digests; returns how many were compared. A folder without digests, such
    as a published model, has none to compare.

    Args:
        every: also files that users may edit, such as generation_config.json.

    Raises:
        UserError: names the file that is missing or differs.
    """
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return 0
    files = read_json(path, dict).get("sha256")
    if not isinstance(files, dict):
        raise UserError(f"{path}: not the digests of an export; export the model again")
    compared = 0
    for name, digest in files.items():
        if not every and (name == GENERATION_FILE or not name.endswith(_DECIDING)):
            continue
        compared += 1
        try:
            found = file_digest(folder / name)
        except FileNotFoundError:
            raise UserError(
                f"{folder / name}: missing, though {DIGESTS_FILE} lists it; export or fetch the folder again"
            ) from None
        except OSError as error:
            raise UserError(f"{folder / name}: not readable: {error}; export or fetch the folder again") from None
        if found != digest:
            raise UserError(
                f"{folder / name}: damaged or edited: its content does not match its digest in {DIGESTS_FILE}; export "
                f"or fetch the folder again, or remove {DIGESTS_FILE} if you changed the folder on purpose"
            )
    return compared
