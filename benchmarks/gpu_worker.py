"""The process that runs the sections of `benchmarks.gpu_suite`: ended when its time is spent, replaced after a failure.

A fault of a kernel leaves a process without a usable GPU, and a compiler can hang: neither ends the suite.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
import torch

from benchmarks.gpu_rows import FAILED, NO_TIME, Row, Setting, failed, not_run

Run = Callable[[Setting], Iterator[Row]]
GRACE = 5
"""Seconds beyond its own that a section has to end by itself."""


class Worker:
    """At most one process at a time, started when it is needed."""

    def __init__(self) -> None:
        self.process: BaseProcess | None = None
        self.line: Connection | None = None

    def begin(self) -> Connection:
        """The line to a process that lives; a new one, not a fork, as a GPU's state cannot be forked."""
        if self.line is None:
            context = multiprocessing.get_context("spawn")
            self.line, other = context.Pipe()
            process = context.Process(target=serve, args=(other,), daemon=False)
            process.start()
            self.process = process
            other.close()
        return self.line

    def rows(self, name: str, run: Run, setting: Setting) -> Iterator[Row]:
        """What `run` yields, as it comes. Of one that fails or takes too long the rows so far, and one that says so."""
        line = self.begin()
        line.send((run, setting))
        broken = ""
        while True:
            if not line.poll(max(0.0, setting.left + GRACE)):
                broken = f"{NO_TIME}: its {setting.seconds:.0f} s were spent"
                yield not_run(f"the rest of {name}", broken)
                break
            try:
                row: Row | None = line.recv()
            except (EOFError, ConnectionResetError):
                broken = "its process ended"
                yield failed(name, broken)
                break
            if row is None:
                break
            print(f"{name}: {row.quantity}: {row.value} {row.unit} {row.verdict}", file=sys.stderr, flush=True)
            if row.verdict == FAILED and setting.cuda:
                broken = "a row failed: the process may be unfit for the next section"
            yield row
        if broken:
            self.end()

    def end(self) -> None:
        """End the process and all that it has started."""
        if self.process is not None and self.line is not None:
            end_tree(self.process)
            self.line.close()
        self.process = self.line = None


def end_tree(process: BaseProcess) -> None:
    """End a process and all that it has started: loaders and compilers too."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.join()


def serve(line: Connection) -> None:
    """Run what is asked for until nobody asks any more; what is printed meanwhile goes to the screen's other stream."""
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    while True:
        try:
            run, setting = line.recv()
        except EOFError:
            return
        try:
            for row in run(setting):
                line.send(row)
        except (Exception, SystemExit) as error:  # noqa: BLE001, whatever it is, it is the section's result
            line.send(failed("the section", error))
        line.send(None)
