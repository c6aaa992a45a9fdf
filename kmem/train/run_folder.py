"""The folder of a run: resolved configuration, tokenizer, cluster tree, metrics, checkpoints."""

import errno
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from kmem.config import Config, UserError, dump_config
from kmem.files import atomic_folder, atomic_write, has_format

METRICS, LOCK = "metrics.jsonl", "lock"
SECONDS_TO_LEAVE = 20.0
"""How long a run waits for another process in its folder: a process killed a moment ago may still be exiting."""


class RunFolder:
    """Paths and files of one run. Only the first rank writes."""

    def __init__(self, config: Config):
        self.path = Path(config.folder) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / METRICS
        self._lock: IO[str] | None = None

    def claim(self, seconds: float = SECONDS_TO_LEAVE) -> str | None:
        """Create the folder and keep other processes from training in it, until `release` or the end of this process;
        returns a problem, or None.

        The fcntl lock also works between machines that share the folder over NFS. If the file system has no locks, or
        the folder cannot be written, nothing is claimed.

        Args:
            seconds: how long to wait for another process to end.
        """
        if has_format(self.path / "manifest.json", "kmem-data"):
            return f"folder: {self.path} is a folder of prepared data; give the run another name or folder"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+")  # noqa: SIM115 (held until release)
        except OSError:  # `prepare` reports it, unless the run is finished and nothing will be written
            return None
        until, told = time.monotonic() + seconds, False
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            if time.monotonic() >= until:
                lock.close()
                return (
                    f"folder: {holder} is training in {self.path}; wait until it ends, stop it, or give this run "
                    f"another name (if that machine is gone and its lock remains, remove {self.path / LOCK})"
                )
            if not told:
                print(f"waiting for {holder} to leave {self.path}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock
        return None

    def release(self) -> None:
        """Let others train in the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration.

        Raises:
            OSError: it cannot be written.
        """
        atomic_write(self.path / "config.yaml", dump_config(config))

    def prepare(self, config: Config, tokenizer: Path, folders: Mapping[str, Path]) -> str | None:
        """Create the folder, write the resolved configuration and keep copies for exports; returns a problem, or None.

        Args:
            folders: name of the copy -> folder to copy besides the tokenizer.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
            for name, source in folders.items():
                # Replaced as a whole: exports would otherwise carry files of an earlier source.
                with atomic_folder(self.path / name, replace=True) as copy:
                    # `copyfile` gives files the modes of the umask.
                    shutil.copytree(source, copy, copy_function=shutil.copyfile, dirs_exist_ok=True)
        except (OSError, UserError) as error:
            return f"folder: {self.path} cannot be written: {error}"
        return None
