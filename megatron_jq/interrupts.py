"""F0: signals that ask a process to end (SIGTERM, SIGUSR1, SIGINT, SIGHUP): what the first one does, and the second.

Python runs a handler in the main thread, between two bytecodes: not while that thread waits in a collective or reads a
file system that does not answer. A thread beside it hears of every signal at once and ends such a process.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
#: A launcher, the scheduler above it and the terminal may all pass on one signal: within this time it is the same one.
SAME_SIGNAL_SECONDS = 1.0
#: How long an ended command may tidy up, and how long a process has to run its own handler.
_TIDY_SECONDS, _HANDLER_SECONDS = 10.0, 1.0
_entered: list[object] = []  # the blocks of `listening` that this process is in


class Interrupted(BaseException):
    """Raised where a signal meets a command; no Exception, so that nobody who handles errors handles this one."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def die(number: int) -> NoReturn:
    """End this process by a signal's own action, so that a shell, and a script in it, see which one it was."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the signal is blocked


@contextlib.contextmanager
def listening(
    first: Callable[[int], None], *, numbers: tuple[int, ...] = SIGNALS, patience: float | None = None
) -> Iterator[None]:
    """Call first(number) in the main thread at the first of `numbers` that comes while entered. A second one ends the
    process at once.

    patience: seconds that the process has left from the first one on; None: no limit. A signal that was ignored when
    the process started (nohup, a script's background job) stays ignored. Elsewhere than in the main thread signals keep
    their meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    since: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not since:
            since.append(now)
            first(number)
        elif now - since[0] > SAME_SIGNAL_SECONDS:
            die(number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, receive) for number in numbers if _may_be_handled(number)}
    _entered.append(receive)
    threading.Thread(target=_enforce, args=(reading, since, patience), name="signals", daemon=True).start()
    try:
        yield
    finally:
        _entered.remove(receive)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.close(writing)  # ends the thread


def _may_be_handled(number: int) -> bool:
    return number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN


def _forget() -> None:
    """In a process that was forked meanwhile: signals to it are none to its parent, and end it."""
    if _entered:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if _may_be_handled(number):
                signal.signal(number, signal.SIG_DFL)
        _entered.clear()


os.register_at_fork(after_in_child=_forget)


def _enforce(reading: int, handled: list[float], patience: float | None) -> None:
    """What `listening` promises, for a main thread that runs no handler."""
    first, number = 0.0, 0
    while True:
        if number and patience is not None:
            left = first + (patience if handled else _HANDLER_SECONDS) - time.monotonic()
            if left <= 0:
                _leave(number)
            if not select.select([reading], [], [], min(left, 0.2))[0]:
                continue
        received = os.read(reading, 1)
        if not received:
            os.close(reading)
            return
        if received[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if not number:
            first, number = now, received[0]
        elif now - first > SAME_SIGNAL_SECONDS:
            time.sleep(0.5)  # the handler's turn
            _leave(received[0])


def _leave(number: int) -> NoReturn:
    """`die` from a thread, to which Python leaves no handler to change."""
    say_ended("megatron-jq", number)
    ctypes.CDLL(None).signal(number, None)  # SIG_DFL
    os.kill(os.getpid(), number)
    time.sleep(1)
    os._exit(128 + number)


def say_ended(name: str, number: int) -> None:
    """One line on standard error, where somebody still reads it."""
    ranked = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
    rank = f"[rank {os.environ['RANK']}] " if ranked else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{rank}{name}: ended by {signal.Signals(number).name} before it was done\n".encode())


@contextlib.contextmanager
def ending_at_once(name: str) -> Iterator[None]:
    """A command's frame: a signal ends it with one line, by that signal, after it removed what is half written.

    name: for the line. A second signal does not wait for the removal. SIGUSR1 keeps its own action, which is to end the
    process: launchers send it only to a process that handles it, so a rank gets it once it is in its steps.
    """
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if _is_importing():
            leave()
        raise Interrupted(number)

    def leave() -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        say_ended(name, received[0])
        die(received[0])

    with listening(end, numbers=tuple(set(SIGNALS) - {signal.SIGUSR1}), patience=_TIDY_SECONDS):
        try:
            yield
        finally:
            if received:  # also where someone caught Interrupted, or made another error of it
                leave()


def _is_importing() -> bool:
    """Whether an import waits for the caller. Extension modules swallow what is raised in an import that they make
    (numpy's and torch's do), and the process would run on with half a module.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
