"""SIGTERM, SIGINT and SIGHUP ask for the step to be finished, the state to be saved, and exit code 0."""

import os
import signal
import time
from types import FrameType


class Interruption:
    """Notes a signal. A second Ctrl-C has its normal effect only after some seconds: launchers forward the first one,
    so a process may receive it twice at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    IMPATIENCE_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
            if int(os.environ.get("RANK", "0")) == 0:  # os.write is safe in a handler
                os.write(2, b"\nstopping after this step, then saving; Ctrl-C again to abort\n")
        elif number == signal.SIGINT and now - self._since > self.IMPATIENCE_SECONDS:
            raise KeyboardInterrupt
