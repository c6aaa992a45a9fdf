"""Processes that begin with everything imported: forks of a server that has imported torch, DeepSpeed and kmem.

Importing them costs a new process seconds. Rank processes (`tests/distributed/rank_pool.py`) and `kmem` commands are
forks of the server: real processes with their own pid, signals, output and exit code, which have not called `exec`.
"""

import contextlib
import gc
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]


def warm_context() -> Any:
    """A multiprocessing context whose processes are forks of this process's server, on the CPU alone."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm_imports"])
    with _environment({"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class WarmCommand:
    """`python -m kmem.cli WORDS` as a fork of the server. Has what the tests need of `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        out, into_out = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the process has ended
        ends = Connection(into_out), Connection(os.dup(self._errors.fileno()))
        arguments = (list(words), dict(environment), *ends)
        self._process = warm_context().Process(target=_run_command, args=arguments)
        self._process.start()
        for end in ends:
            end.close()
        self.stdout: TextIO = open(out)  # noqa: SIM115  # closed by `communicate`

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 150) -> tuple[str, str]:
        """Wait for the end; what is left of the output, and the errors.

        Raises:
            subprocess.TimeoutExpired: it was still running and has been killed.
        """
        rest: list[str] = []
        reader = threading.Thread(target=lambda: rest.append(self.stdout.read()))
        reader.start()
        self._process.join(timeout)
        late = self._process.exitcode is None
        if late:
            self.kill()
            self._process.join()
        reader.join(10)  # a process that it started may hold the pipe
        self._errors.seek(0)
        with self._errors as errors:
            said = errors.read()
        if late:
            raise subprocess.TimeoutExpired("kmem", timeout, "".join(rest), said)
        assert rest, "the command has ended, a process that it started has not"
        self.stdout.close()
        return rest[0], said


def _run_command(words: list[str], environment: dict[str, str], out: Connection, errors: Connection) -> None:
    for number, end in ((1, out), (2, errors)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(ROOT)
    gc.freeze()
    from kmem.parallel import local_launch

    local_launch.subprocess = SimpleNamespace(Popen=_ForkedRank)  # type: ignore[assignment]
    sys.exit(_main(words, environment))


def _main(words: list[str], environment: Mapping[str, str]) -> int:
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    from kmem.cli import main

    sys.argv = ["kmem", *words]
    return main(words)


class _ForkedRank:
    """What `launch_local` needs of `subprocess.Popen`, as a fork of the launching process."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        start_new_session: bool,
        preexec_fn: Callable[[], None],
    ) -> None:
        assert list(command[:3]) == [sys.executable, "-m", "kmem.cli"]
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                if start_new_session:
                    os.setsid()
                preexec_fn()
                code = _main(list(command[3:]), env)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
