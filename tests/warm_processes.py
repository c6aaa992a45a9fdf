"""Processes that begin with everything imported: forks of a server that has imported torch, DeepSpeed and kmem.

Importing them costs a new process seconds. Rank processes (`tests/distributed/rank_pool.py`), `kmem` commands and
programs are forks of a server: real processes with their own pid, signals, output and exit code, which have not called
`exec`. A second server has imported torch and Transformers, and nothing of kmem.
"""

import contextlib
import gc
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
WITH_KMEM, WITHOUT_KMEM = "tests.warm_imports", "tests.warm_transformers"
_servers: dict[str, Any] = {}


class _WarmProcess(ForkServerProcess):
    """A process that a server forks which has imported `imported`."""

    imported: str

    @staticmethod
    def _Popen(process: "_WarmProcess") -> Any:
        server = _servers.get(process.imported)
        if server is None:
            server = _servers[process.imported] = forkserver.ForkServer()
            server.set_forkserver_preload([process.imported])
        with _environment({"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):
            server.ensure_running()
        # multiprocessing itself knows one server only.
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            return ForkServerProcess._Popen(process)


class WarmContext(ForkServerContext):
    """A multiprocessing context, on the CPU alone: its processes have imported a module."""

    def __init__(self, imported: str) -> None:
        super().__init__()
        self._imported = imported

    def Process(self, *arguments: Any, **options: Any) -> _WarmProcess:  # type: ignore[override]
        process = _WarmProcess(*arguments, **options)
        process.imported = self._imported
        return process


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_warm_program(
    program: str | Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """`python -c PROGRAM ARGUMENTS` in a folder, or `python PATH ARGUMENTS`, with torch and Transformers imported."""
    process = start_program(WITHOUT_KMEM, program, arguments, environment, folder)
    out, errors = process.communicate(240)
    return subprocess.CompletedProcess([str(program), *arguments], process.returncode or 0, out, errors)


def start_program(
    imported: str, program: str | Path, arguments: Sequence[str], environment: Mapping[str, str], folder: Path
) -> "WarmProcess":
    """The same, with what a server has imported, without waiting for its end."""
    return WarmProcess(imported, _run_program, program, list(arguments), dict(environment), folder)


class WarmProcess:
    """A function that runs in a fork of a server. Has what the tests need of `subprocess.Popen`."""

    def __init__(self, imported: str, work: Callable[..., Any], *arguments: Any) -> None:
        """work: a module-level function, called with these picklable arguments; what it returns is the exit code."""
        out, into_out = os.pipe()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # read when the process has ended
        ends = Connection(into_out), Connection(os.dup(self._errors.fileno()))
        self._process = WarmContext(imported).Process(target=_begin, args=(*ends, work, arguments))
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

    def wait(self, timeout: float = 150) -> int:
        """Wait for the end, which must come in time; the exit code."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it is still running"
        return self._process.exitcode

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
            raise subprocess.TimeoutExpired("a warm process", timeout, "".join(rest), said)
        assert rest, "the command has ended, a process that it started has not"
        self.stdout.close()
        return rest[0], said


def _begin(out: Connection, errors: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    for number, end in ((1, out), (2, errors)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    gc.freeze()
    sys.exit(work(*arguments))


def _enter(environment: Mapping[str, str], folder: Path) -> None:
    """As a new process there, with nothing of the one that it was forked from."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _run_program(program: str | Path, arguments: list[str], environment: Mapping[str, str], folder: Path) -> None:
    _enter(environment, folder)
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT]
    if "HF_MODULES_CACHE" in environment:  # which Transformers read when it was imported
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]  # type: ignore[attr-defined]
    sys.argv = ["-c" if isinstance(program, str) else str(program), *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(program, {"__name__": "__main__"})


def start_command(words: Sequence[str], environment: Mapping[str, str]) -> WarmProcess:
    """`python -m kmem.cli WORDS`."""
    return WarmProcess(WITH_KMEM, _run_command, list(words), dict(environment))


def _run_command(words: list[str], environment: dict[str, str]) -> int:
    from kmem.parallel import local_launch

    local_launch.subprocess = SimpleNamespace(Popen=_ForkedRank)  # type: ignore[assignment]
    return _main(words, environment)


def _main(words: list[str], environment: Mapping[str, str]) -> int:
    _enter(environment, ROOT)
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
