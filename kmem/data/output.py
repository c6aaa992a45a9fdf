"""The folder of prepared data, which appears under its name only when it is complete."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

from kmem.config import UserError
from kmem.data.manifest import MANIFEST_NAME
from kmem.files import atomic_folder


def complete_folder(out: Path, force: bool) -> AbstractContextManager[Path]:
    """`atomic_folder(out)`, where there is no other data.

    Raises:
        UserError: `out` is a finished preparation and force is off, or holds something else; or as `atomic_folder`.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file of that name exists")
    if out.exists() and any(out.iterdir()):
        if not _is_prepared(out):
            raise UserError(f"--out {out}: exists and holds something else than prepared data; choose another folder")
        if not force:
            raise UserError(f"--out {out}: already prepared; replace it with --force or choose another folder")
    return atomic_folder(out, replace=force)


def _is_prepared(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")).get("format") == "kmem-data"
    except (OSError, ValueError, AttributeError):
        return False
