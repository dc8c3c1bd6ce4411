"""F4: a signal that asks a run to stop: finish the step, save, end with exit code 0."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: A launcher and the scheduler above it may both pass on one signal: what comes within this time is the same one.
_SAME_SIGNAL_SECONDS = 1.0


class StopRequest:
    """Which signal this process received, if any. A second one, later, ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    @property
    def name(self) -> str:
        return "a signal to another rank" if self.number is None else signal.Signals(self.number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle SIGTERM and SIGUSR1 while entered. Elsewhere than in the main thread signals keep their meaning."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
        elif now - self._since > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
