"""F0: standard output and standard error that never end a process.

Text of another alphabet than the terminal's is written with backslash escapes, and text that nobody can read any more
(`| head` has ended, the terminal is closed) goes nowhere. A run writes its results to files: what it prints is a view
of them. A command whose result is what it prints asks `loss` at its end.
"""

import errno
import io
import os
import select
import sys
from typing import Any

#: What a write says when its reader is gone: that one has what it wanted, or there is nobody to tell.
_READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN)


class _Drain(io.RawIOBase):
    """A file descriptor to write to, for as long as that is possible. lost: why something was not written."""

    mode = "wb"

    def __init__(self, descriptor: int, name: str):
        self._descriptor, self.name = descriptor, name
        self.lost: str | None = None

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:  # of any type with a buffer
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                done += os.write(self._descriptor, view[done:])
            except BlockingIOError:  # a terminal that another program has set so
                select.select([], [self._descriptor], [])
            except OSError as error:
                if error.errno in _READER_IS_GONE:
                    _point_to_nothing(self._descriptor)
                else:
                    self.lost = error.strerror or str(error)  # a full disk: what comes later may fit again
                break
        return len(view)


def _point_to_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing != descriptor:  # it is, where the descriptor was closed
        os.dup2(nothing, descriptor)
        os.close(nothing)


def protect() -> None:
    """Make sys.stdout and sys.stderr such streams, where they are the process's own (not a test's, nor protected).

    Call it first of all in a program. A stream that was closed when the process began writes nowhere; otherwise its
    number would go to the next file that is opened.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            _point_to_nothing(descriptor)
            raw = _Drain(descriptor, f"<{name}>")
            setattr(sys, name, _text(raw, "utf-8", buffered=False, line_buffering=True))
        elif stream is original and isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor:
            try:
                stream.flush()
            except OSError:
                continue  # nothing can be written, and what waits there cannot be taken back
            raw, unbuffered = _Drain(descriptor, stream.name), stream.write_through
            text = _text(raw, stream.encoding, buffered=not unbuffered, line_buffering=stream.line_buffering)
            setattr(sys, name, text)


def _text(raw: _Drain, encoding: str, *, buffered: bool, line_buffering: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if buffered else raw,
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=line_buffering,
        write_through=not buffered,
    )


def loss() -> str | None:
    """Why standard output lacks something that somebody may still read, in the system's words; None where nothing."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return None
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, _Drain):
        return None
    stream.flush()
    return raw.lost
