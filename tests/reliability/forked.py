"""A function in a forked child, which may be killed, run out of memory or hang: a start costs no import."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import PATIENCE

HANDLED = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # pytest and earlier tests may hold these


@dataclass(frozen=True)
class Ended:
    """How a child ended: by `code` or by `signal`, the other is None; and all it wrote."""

    code: int | None
    signal: int | None
    output: str


def forked(
    function: Callable[[], int | None],
    *,
    seconds: float = PATIENCE,
    memory_bytes: int | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Fork, run `function` in the child and wait: its return value or SystemExit is the exit code (None is 0), an
    exception prints its traceback and gives 1.

    SIGALRM ends the child after `seconds`; `memory_bytes` bounds what it may map on top of what this process maps;
    SIGKILL comes `kill_after` seconds after the fork if the child still runs. What it writes to file descriptors 1 and
    2 is returned, also after a kill. CUDA must not have started, and torch must have one thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written:
        child = os.fork()
        if child == 0:
            _live(function, written.fileno(), seconds, memory_bytes)
        if kill_after is not None:
            _end_after(child, kill_after)
        status = os.waitpid(child, 0)[1]
        written.seek(0)
        output = written.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        return Ended(None, os.WTERMSIG(status), output)
    return Ended(os.WEXITSTATUS(status), None, output)


def _end_after(child: int, delay: float) -> None:
    """SIGKILL for a child that still runs after `delay` seconds; it is not yet waited for, so the id is its own."""
    end = time.monotonic() + delay
    while (left := end - time.monotonic()) > 0:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(min(left, 0.05))
    os.kill(child, signal.SIGKILL)


def _live(function: Callable[[], int | None], output: int, seconds: float, memory_bytes: int | None) -> None:
    """The child from the fork to its end; never returns."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1, errors="replace") for n in (1, 2))
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        if memory_bytes is not None:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, resource.RLIM_INFINITY))
        code = int(function() or 0)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001, nothing of the parent may run in the child
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
