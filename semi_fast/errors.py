"""Failures and the exit codes that name them."""

from __future__ import annotations

import errno
import re
import traceback

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Of an OSError: the disk is full, or may not take more."""


class NonFiniteError(RuntimeError):
    """A step whose loss, outputs or gradients were not finite."""

    def __init__(self, step: int, ids: list[int]):
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        super().__init__(
            f"loss, outputs or gradients are not finite at step {step} (sample ids {shown}); lower optim.lr"
        )
        self.step, self.ids = step, ids


class PreemptedError(RuntimeError):
    """The run was asked to end, and has saved what it was doing."""


EXPECTED = (ValueError, RuntimeError, OSError, KeyboardInterrupt)


def exit_code(error: BaseException) -> int:
    """4 for numerics, 75 for a run that can be resumed, 2 for what the user must change, 3 for the machine, 1 for what
    should not happen.

    130 for Ctrl-C, as shells have it, where nothing has been saved.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, NonFiniteError):
        return 4
    if isinstance(error, PreemptedError):
        return 75
    if isinstance(error, ValueError):
        return 2
    return 3 if isinstance(error, EXPECTED) else 1


def one_line(error: BaseException) -> str:
    """The message as one line of the program."""
    return f"semi-fast: {described(error)}"


def described(error: BaseException) -> str:
    """What has happened, in one line: of an OSError the file, the call and the way out."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = ": ".join([*([" -> ".join(files)] if files else []), reason(error)])
    return " ".join(text.split())


def reason(error: OSError) -> str:
    """`fsync: Invalid argument (EINVAL)` and the way out; a full disk speaks for itself."""
    if error.errno is None:
        return str(error)
    if error.errno in NO_SPACE:
        return f"{error.strerror}; disk full?"
    name = errno.errorcode.get(error.errno, str(error.errno))
    return f"{failed_call(error)}: {error.strerror} ({name}); check that place, or choose another"


def failed_call(error: OSError) -> str:
    """The call that failed, as a note of the error says, or the line of source that raised it: `os.mkdir`."""
    if notes := getattr(error, "__notes__", ()):
        return notes[-1]
    line = "".join(frame.line or "" for frame in traceback.extract_tb(error.__traceback__)[-1:])
    call = re.search(r"[\w.]+(?=\()", line)
    return call[0] if call else type(error).__name__
