"""Being asked to end: signals are noted, and all processes agree on the step after which they save and stop."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from semi_fast import processes
from semi_fast.errors import PreemptedError
from semi_fast.launch import LAUNCHED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ASK_SECONDS = 1.0
"""Several processes ask one another about this often whether to stop."""
MOST_STEPS_APART = 1000
SAME_SECONDS = 2.0
"""A signal so soon after the first is the same request: launchers pass on what the terminal has sent to all."""
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Preemption:
    """While entered, each of SIGNALS asks the run to stop; a later second one acts as it always does.

    A SIGHUP that is ignored, as `nohup` has it, stays so.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Several processes wait so long for one another's answer."""
        self.timeout = timedelta(seconds=timeout_seconds)
        self.asked: signal.Signals | None = None
        self.asked_time = 0.0
        self.before: dict[signal.Signals, signal.Handlers | None] = {}
        self.group: Any = None
        self.next_question, self.last_step, self.last_time = 0, 0, time.monotonic()

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            taken = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
            self.before = {one: signal.signal(one, self.note) for one in taken}  # type: ignore[misc]
        if processes.count() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)  # on the host: no wait for the device
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.restore()
        if self.group is not None and kind is None:  # after a failure others may not answer
            dist.destroy_process_group(self.group)
            self.group = None

    def restore(self) -> None:
        for one, handler in self.before.items():
            signal.signal(one, handler)
        self.before = {}

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self.asked_time = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.asked_time > SAME_SECONDS:
            self.restore()
            os.kill(os.getpid(), number)

    def check(self, done: int) -> signal.Signals | None:
        """After step `done` on all processes alike: the signal that one of them was sent, or None.

        Several processes exchange it about once a second: at steps that follow from the slowest one's pace.
        """
        if self.group is None:
            return self.asked
        if done < self.next_question:
            return None
        now = time.monotonic()
        pace = (done - self.last_step) / max(now - self.last_time, 1e-6)  # steps per second
        self.last_step, self.last_time = done, now
        answer = torch.tensor([-int(self.asked or 0), int(pace * ASK_SECONDS)])
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self.group)
        self.next_question = done + max(1, min(int(answer[1]), MOST_STEPS_APART))
        return signal.Signals(-int(answer[0])) if answer[0] else None


def stop(asked: signal.Signals, done: int, run_dir: Path) -> PreemptedError:
    """What ends a run that was asked to, after its checkpoint of step `done`; with the command that goes on."""
    resume = shlex.quote(f"--resume={run_dir}")
    how = f"semi-fast train {resume}" if processes.count() == 1 else f"{resume} alone, launched as before"
    return PreemptedError(f"{asked.name}: saved after step {done}; go on with: {how}")


def end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM when the launcher that started this process is gone; Linux alone."""
    if "LOCAL_RANK" in os.environ or LAUNCHED in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
