"""F4: a signal that asks a run to stop: finish the step, save, end with exit code 0."""

import contextlib
import os
import signal
from collections.abc import Iterator

from megatron_jq.interrupts import listening


class StopRequest:
    """Which signal this process received, if any. A second one, later, ends the process at once."""

    def __init__(self, *, announce: bool = False) -> None:
        self.number: int | None = None
        self._announce = announce

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note SIGTERM, SIGUSR1, SIGINT and SIGHUP while entered. announce: say on standard error what happens now."""
        with listening(self._note):
            yield self

    def _note(self, number: int) -> None:
        self.number = number
        if self._announce:
            line = f"megatron-jq: {signal_name(number)}: ends after this step and saves it; a second signal ends now\n"
            with contextlib.suppress(OSError):  # a terminal that is gone
                os.write(2, line.encode())


def signal_name(number: int) -> str:
    return signal.Signals(number).name
