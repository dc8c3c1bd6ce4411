"""Ports for the stores of tests that run at the same time."""

import contextlib
import random
import socket

_BELOW_THE_KERNELS = range(20_000, 32_768)
_draw = random.SystemRandom()  # tests seed the others


def free_port() -> int:
    """Return a port that nothing holds and that the kernel hands to nobody by itself (its own begin at 32768).

    It is bound only once the ranks have started: one of the kernel's could be another test's by then.
    """
    while True:
        port = _draw.choice(_BELOW_THE_KERNELS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
