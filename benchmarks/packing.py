"""Several processes that train on one device: how soon each takes its first step, and what they give together."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from benchmarks import step_cases
from benchmarks.gpu_worker import end_tree
from benchmarks.step_cases import Rung, Runner, Shape

PATIENCE = 120  # seconds within which a process must answer


class Told(NamedTuple):
    """What a process is to train, on synthetic images."""

    shape: Shape
    rung: Rung
    device: torch.device
    small: bool


class Ran(NamedTuple):
    """Steps that were done, and how long they took."""

    steps: int
    seconds: float


@dataclass
class Member:
    """A process that steps when it is told to."""

    process: BaseProcess
    line: Connection
    began: float

    def hear(self) -> Ran | float:
        """What it says next; RuntimeError if it says nothing."""
        if self.line.poll(PATIENCE):
            try:
                return self.line.recv()
            except EOFError:
                pass
        raise RuntimeError("a process that should train has failed, see above")

    def first_step(self) -> float:
        """Seconds from its start to the end of its first step."""
        at = self.hear()
        assert isinstance(at, float)
        return at - self.began


@contextmanager
def members() -> Iterator[list[Member]]:
    """A list to add to by `join`; all in it are ended."""
    found: list[Member] = []
    try:
        yield found
    finally:
        for member in found:
            end_tree(member.process)


def join(found: list[Member], told: Told) -> Member:
    """A new process; it begins at once."""
    context = multiprocessing.get_context("spawn")
    line, other = context.Pipe()
    process = context.Process(target=serve, args=(told, other), daemon=False)
    began = time.monotonic()
    process.start()
    other.close()
    found.append(Member(process, line, began))
    return found[-1]


def together(active: Sequence[Member], seconds: float) -> list[Ran]:
    """All of these step for so long at the same time; the others wait."""
    at = time.monotonic() + 0.2
    for member in active:
        member.line.send((at, seconds))
    found = [member.hear() for member in active]
    return [ran for ran in found if isinstance(ran, Ran)]


def serve(told: Told, line: Connection) -> None:
    """The process: one step, then as many as it is told."""
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    with ExitStack() as stack:
        manifest = stack.enter_context(step_cases.data_of(told.shape, None, small=told.small))
        runner = Runner(step_cases.open_rung(told.rung, told.shape, manifest, told.device, stack))
        runner.step()
        step_cases.wait(told.device)
        line.send(time.monotonic())
        while True:
            try:
                at, seconds = line.recv()
            except EOFError:
                return
            time.sleep(max(0.0, at - time.monotonic()))
            line.send(run_for(runner, seconds))


def run_for(runner: Runner, seconds: float) -> Ran:
    """Steps for about so long, the device idle before and after."""
    steps, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        for _ in range(10):
            runner.step()
        steps += 10
        step_cases.wait(runner.engine.device)
    return Ran(steps, time.perf_counter() - start)
