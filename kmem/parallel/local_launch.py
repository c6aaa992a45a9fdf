"""Starting local ranks without a launcher: `kmem train --nproc N`."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
INTERRUPTED = os.EX_TEMPFAIL
"""Exit code (75) of a run that was asked to stop and has saved its state: the same command continues it."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop. Slurm sends SIGUSR1 ahead of the end of a job, if asked to (`--signal`)."""
_REASONS = {
    signal.SIGBUS: ": a file that is mapped into memory was cut short, or its disk is full",
    signal.SIGKILL: ": the machine may have run out of memory",
}
_GRACE_SECONDS = 10.0
"""How long ranks may take to end after another rank failed."""


def launch_local(arguments: Sequence[str], ranks: int) -> int:
    """Run `python -m kmem.cli ARGUMENTS` once per rank and wait; returns the exit code for this process.

    Every rank receives a signal once, finishes its step and saves; the exit code is then INTERRUPTED. If a rank fails,
    the others are ended and its exit code is returned.
    """
    port = free_port() if ranks > 1 else 0
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        for rank in range(ranks):
            processes.append(_start(arguments, rank, ranks, port, threads))
        return _wait(processes)
    finally:
        _end(processes, 0.0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port for rank 0 to listen on, below the ports that systems hand out, so that no other process takes it."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return probe.getsockname()[1]


def _start(arguments: Sequence[str], rank: int, ranks: int, port: int, threads: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kmem.cli", *arguments],
        env=environment,
        start_new_session=True,  # Ctrl-C then reaches the ranks only through this process, and once
        preexec_fn=_stop_with_parent,
    )


def _stop_with_parent() -> None:
    """In a rank, before it starts: ask Linux for a SIGTERM when the launching process dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _wait(processes: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failures = [rank for rank, code in enumerate(codes) if code not in (None, 0, INTERRUPTED)]
        if failures:
            # A rank that was killed is the cause, and the errors of others its effect.
            failed = min(failures, key=lambda rank: (codes[rank] or 0) > 0)
            _end(processes, _GRACE_SECONDS)
            code = codes[failed]
            assert code is not None
            if code < 0:
                ended_by = signal.Signals(-code)
                print(f"rank {failed} was ended by {ended_by.name}{_REASONS.get(ended_by, '')}", file=sys.stderr)
                return 128 - code
            return code
        if None not in codes:
            return max(code or 0 for code in codes)
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen], grace: float) -> None:
    """Give processes that still run `grace` seconds to report their own errors, then end them."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
