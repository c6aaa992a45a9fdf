"""Files compared with their digests once: what was compared is remembered by size and time of change."""

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Protocol

from kmem.config import UserError
from kmem.data.progress import Progress
from kmem.files import atomic_write
from kmem.model.file_digest import file_digest

_SHOWN_BYTES = 1 << 30
"""Comparing more bytes than this takes long enough for a progress bar."""
Compared = tuple[str, int, int, str]
"""(path, size, time of change in ns, digest) of a file that has this digest."""
_verified: set[Compared] = set()
"""The files that this process has compared or remembers."""


class Recorded(Protocol):
    """What a manifest says of a file."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its digest."""


def verify_files(folder: Path, files: Mapping[str, Recorded], anew: bool = False) -> None:
    """Compare files with their digests. A file that was found right before, and has kept its size and time of change
    since, is not read again, also by later processes of the user (`kmem/verified.json` in the user's cache).

    Args:
        anew: read every file.

    Raises:
        UserError: names the file that is missing or damaged.
    """
    if not _verified:
        _verified.update(_remembered())
    keys = {name: _key(folder / name, file) for name, file in files.items()}
    unread = {name: key for name, key in keys.items() if anew or key not in _verified}
    if not unread:
        return
    total = sum(files[name].bytes for name in unread)
    progress = Progress(f"comparing {folder} with its digests", total) if total > _SHOWN_BYTES else None
    with progress or nullcontext():
        for name in unread:
            if file_digest(folder / name) != files[name].sha256:
                raise UserError(
                    f"{folder / name}: damaged: its content does not match its digest in the manifest; "
                    f"{remedy(folder / name)}"
                )
            if progress is not None:
                progress.advance(files[name].bytes)
    _remember(set(unread.values()))


def remember_files(folder: Path, files: Mapping[str, Recorded]) -> None:
    """Remember files whose digests were computed a moment ago, so that they are not read again."""
    _remember({_key(folder / name, file) for name, file in files.items()})


def remedy(path: Path) -> str:
    """What to do about a damaged file of a folder of data."""
    if path.is_symlink():
        return f"restore {os.readlink(path)}, to which it is a link, or adopt the data anew"
    return "copy it again or prepare the folder anew"


def _remember(found: set[Compared]) -> None:
    _verified.update(found)
    with suppress(OSError):  # where nothing can be remembered, the next process compares again
        _memory().parent.mkdir(parents=True, exist_ok=True)
        present = sorted(entry for entry in {*_remembered(), *found} if os.path.exists(entry[0]))
        atomic_write(_memory(), json.dumps(present))


def _key(path: Path, file: Recorded) -> Compared:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: not readable: {error}; {remedy(path)}") from None
    return str(path.resolve()), found.st_size, found.st_mtime_ns, file.sha256


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kmem" / "verified.json"


def _remembered() -> list[Compared]:
    with suppress(OSError, ValueError, TypeError, RuntimeError):
        entries = [tuple(entry) for entry in json.loads(_memory().read_text(encoding="utf-8"))]
        return [(path, size, time, digest) for path, size, time, digest in entries]
    return []
