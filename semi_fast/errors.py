"""Failures and the exit codes that name them."""

from __future__ import annotations

import errno

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
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
    return f"semi-fast: {text}"
