"""Files and folders that appear only when complete and then survive a power cut; JSON files written by others."""

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from kmem.config import UserError

PARTIAL, REPLACED = ".partial", ".replaced"
"""Suffixes of the name: of a file or folder while it is being written, and of an old folder about to be removed."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK = ".lock"
Form = TypeVar("Form", dict[str, Any], list[Any])


class AtomicFile:
    """A binary file written as NAME.partial. It is renamed to NAME when the block succeeds and removed when it raises.

    Its mode follows the umask. An existing file of that name is replaced.

    Args:
        path: the finished file. Its folder exists.
        buffering: as in `open`.

    Raises:
        OSError: the file cannot be written. That of a full disk names the file, too.
    """

    def __init__(self, path: Path, buffering: int = -1) -> None:
        self.path, self._partial = path, path.with_name(path.name + PARTIAL)
        self.stream: IO[bytes] = open(self._partial, "wb", buffering)  # noqa: SIM115 - closed by commit or discard

    def commit(self) -> None:
        """Flush to the disk and give the file its name."""
        try:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
            os.replace(self._partial, self.path)
            sync_path(self.path.parent)
        except BaseException as error:
            self._name(error)
            self.discard()
            raise

    def _name(self, error: BaseException | None) -> None:
        """Writing to a stream raises errors without the name of its file."""
        if isinstance(error, OSError) and error.errno in FULL_DISK and error.filename is None:
            error.filename = str(self.path)

    def discard(self) -> None:
        """Remove the partial file; after `commit` this does nothing."""
        with suppress(OSError):  # closing flushes the buffer, which may fail
            self.stream.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *details: object) -> None:
        if kind is None:
            self.commit()
        else:
            self._name(error)
            self.discard()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file as an `AtomicFile`; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    with AtomicFile(path) as file:
        file.stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """An empty folder NAME.partial. It is renamed to NAME when the block succeeds and removed when it raises.

    A process that is killed leaves `path` as it was. The next process that writes `path` clears the partial folder.

    Args:
        path: absent, or an empty folder.
        replace: `path` may also be a folder with files, which is removed once the new one has its name.

    Raises:
        UserError: `path` has files, another process is writing it, or the system refused what the block does.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(path.name + PARTIAL)
    # Of this writer alone: another one may make `partial` again as soon as it is renamed.
    complete, old = (path.with_name(f"{path.name}.{_writer()}{ending}") for ending in (PARTIAL, REPLACED))
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial, path):
            mine = partial
            try:
                if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
                    raise UserError(f"{path}: exists and is not an empty folder; choose a new name")
                _clear(partial)
                _remove_abandoned(path)
                yield partial
                for entry in [*partial.rglob("*"), partial]:
                    if not entry.is_symlink():  # to someone else's file
                        sync_path(entry)  # everything is on the disk before the folder gets its name
                os.rename(partial, complete)
                mine = complete
                (complete / _LOCK).unlink()
                if replace and path.exists():
                    os.rename(path, old)
                os.rename(complete, path)  # an empty folder of that name is replaced
            except BaseException as error:
                shutil.rmtree(mine, ignore_errors=True)
                if old.exists():
                    if path.exists():
                        shutil.rmtree(old, ignore_errors=True)
                    else:
                        os.rename(old, path)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise UserError(f"{path}: another process has written it meanwhile") from None
                raise
        sync_path(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        refused = refused_by_system(error)
        if refused is None:
            raise
        remedy = "; make room or choose another disk" if refused.errno in FULL_DISK else ""
        raise UserError(f"{path}: cannot be written: {refused}{remedy}") from error


def refused_by_system(error: Exception) -> OSError | None:
    """What the operating system refused, if that is the reason for `error`. Libraries written in Rust, such as
    tokenizers, raise plain exceptions for it, whose text ends in "(os error 28)"."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)$", str(error))
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def _writer() -> str:
    return f"{os.getpid()}-{threading.get_ident()}-{socket.gethostname()}"


def _remove_abandoned(path: Path) -> None:
    """Remove what writers left behind that were killed while they renamed."""
    for ending in (PARTIAL, REPLACED):
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.*-*-*{ending}"):
            process, _, host = leftover.name.removeprefix(f"{path.name}.").removesuffix(ending).split("-", 2)
            if host == socket.gethostname() and not Path(f"/proc/{process}").exists():
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    """Make a folder and hold its lock.

    Raises:
        UserError: another process holds it.
    """
    while True:
        try:
            partial.mkdir(exist_ok=True)
            lock = open(partial / _LOCK, "w")  # noqa: SIM115 - closed below
        except (FileNotFoundError, FileExistsError):  # its writer has just renamed or removed the folder
            if partial.exists() and not partial.is_dir():
                raise
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another process is writing it ({partial})") from None
            except OSError:
                pass  # a file system without locks
            # The lock of a folder that has been renamed or removed since it was opened protects nothing.
            current = None
            with suppress(FileNotFoundError):
                current = os.stat(partial / _LOCK)
            if current is not None and os.path.samestat(os.fstat(lock.fileno()), current):
                yield
                return


def check_replaceable(out: Path, what: str, is_one: bool, force: bool, instead: str = "choose another folder") -> None:
    """Check that a command may write `--out`: it is absent or empty, or it holds an earlier result and `force` is set.

    Args:
        what: what the command writes, such as `a tree`.
        is_one: whether `out` holds one already.
        instead: the remedy other than --force.

    Raises:
        UserError: `out` may not be written.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if any(out.iterdir()) and not is_one:
        raise UserError(f"--out {out}: exists and holds something else, not {what}; choose another folder")
    if is_one and not force:
        raise UserError(f"--out {out}: {what} is already there; {instead}, or replace it with --force")


def read_json(path: Path, kind: type[Form]) -> Form:
    """The object (dict) or array (list) in a JSON file that is part of a downloaded folder.

    Raises:
        UserError: the file is missing, damaged, or holds the other kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; fetch the whole folder again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from None
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}; fetch it again")
    return content


def has_format(path: Path, format: str) -> bool:
    """Whether `path` is a JSON file whose field `format` has this value."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") == format
    except (OSError, ValueError, AttributeError):
        return False


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
