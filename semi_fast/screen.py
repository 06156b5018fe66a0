"""Standard output and error that take what is printed: what they cannot show is replaced, readers may close them."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

NO_READER = {errno.EPIPE, errno.ECONNRESET}
"""Of an OSError: whoever read has enough of it."""


class TolerantFile(io.FileIO):
    """A descriptor that takes whatever is written: without a reader it leads nowhere from then on; what is refused for
    another reason, which may pass, is lost."""

    failure: OSError | None = None
    """Of what was lost last."""

    def write(self, data: Any, /) -> int:
        try:
            while (written := super().write(data)) is None:  # a pipe that is full and does not block
                select.select([], [self], [])
        except OSError as error:
            if without_reader(error, self.fileno()):
                redirect_to_null(self.fileno())
            else:
                self.failure = error
            return memoryview(data).nbytes
        return written


def without_reader(error: OSError, number: int) -> bool:
    """Whether a write failed as nobody reads any more; EIO is of a terminal that is gone, or else the disk's."""
    return error.errno in NO_READER or (error.errno == errno.EIO and stat.S_ISCHR(os.fstat(number).st_mode))


@contextmanager
def tolerate_closed_pipes() -> Iterator[None]:
    """Meanwhile `sys.stdout` and `sys.stderr` take whatever is printed; those of a test or a notebook are left."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ours = tolerant(sys.stdout, 1), tolerant(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def tolerant(stream: TextIO | None, number: int) -> TextIO:
    """The stream, on a TolerantFile if it has a descriptor; None, which Python has for a closed one, leads nowhere."""
    if stream is None:
        redirect_to_null(number)
        return open(number, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper) or not has_descriptor(stream):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(TolerantFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def has_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() >= 0
    except io.UnsupportedOperation:
        return False


def redirect_to_null(number: int) -> None:
    """Point a descriptor at the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def check_taken() -> None:
    """Raise RuntimeError if standard output was refused by anything but a reader who has enough: a full disk, say."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, TolerantFile) and raw.failure is not None:
        raise RuntimeError(f"standard output could not be written: {raw.failure.strerror}; what it lacks is lost")
