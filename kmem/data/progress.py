"""Progress of long work: a bar on a terminal, plain lines otherwise."""

import sys
import time

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A task with a known amount of work, in units such as bytes. A context manager that writes to stderr."""

    def __init__(self, title: str, total: int):
        self._title = title
        self._total = max(total, 1)
        self._done = 0
        self._on_terminal = sys.stderr.isatty()
        columns = (*Bar.get_default_columns(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not self._on_terminal)
        self._task = self._bar.add_task(title, total=self._total)
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def advance(self, amount: int) -> None:
        """Report that `amount` more work is done."""
        self._done += amount
        if self._on_terminal:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            share = min(self._done / self._total, 1.0)
            print(f"{self._title}: {share:.0%}", file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self._bar.update(self._task, completed=self._total)
        if self._on_terminal:
            self._bar.stop()
        elif kind is None:
            print(f"{self._title}: done in {time.monotonic() - self._started:.1f} s", file=sys.stderr, flush=True)
