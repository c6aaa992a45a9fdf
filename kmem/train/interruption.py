"""Signals that ask for the step to be finished and the state to be saved."""

import contextlib
import os
import signal
import time
from types import FrameType

from kmem.parallel.local_launch import SIGNALS


class Interruption:
    """Notes a signal while it listens. A second Ctrl-C has its normal effect only after some seconds: launchers forward
    the first one, so a process may receive it twice at once."""

    IMPATIENCE_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saved = False
        """Set once the run has saved its state: later signals then have no effect."""
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def close(self) -> None:
        """Give signals the effect that they had before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.saved:
            return
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if int(os.environ.get("RANK", "0")) == 0:
                with contextlib.suppress(OSError):  # nobody may be reading any more
                    # os.write is safe in a handler.
                    os.write(2, b"\nstopping after this step, then saving; Ctrl-C again to abort\n")
        elif number == signal.SIGINT and now - self._since > self.IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
