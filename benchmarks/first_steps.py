"""How a trainer begins: seconds to its first steps, and the memory that they take."""

from __future__ import annotations

import multiprocessing
import resource
import time
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.step_cases import MIB, Peak
from benchmarks.trainers import Setting, Trainer, run_steps, wait_for

MORE = 2  # steps after the first one, over which memory is looked at
MEANING = (
    "Start: on a CPU a new process, its imports left out, to the end of building and of the first step. Memory: what "
    "three steps take beyond the imports, on a CPU the peak of that process and what its workers have of their own; on "
    "a GPU the most that torch allocates from building on, searches for the fastest kernels among it"
)


class First(NamedTuple):
    """How a trainer begins."""

    build_seconds: float
    """Reading the data, network, optimizer, loaders."""
    step_seconds: float
    """The first step, with compilation and capture."""
    peak_mib: float | None
    reserved_mib: float | None
    """On a GPU, what torch has taken from it."""


def begin_here(name: str, setting: Setting) -> tuple[Trainer, First]:
    """A trainer after its first steps, in this process, whose memory counts on a GPU alone."""
    peak, start = Peak(setting.device), time.perf_counter()
    trainer = setting.open(name)
    wait_for(setting.device)
    built = time.perf_counter()
    trainer.step()
    wait_for(setting.device)
    first = time.perf_counter()
    run_steps(trainer, MORE)
    return trainer, First(built - start, first - built, *(peak.read() or (None, None)))


def begin(name: str, setting: Setting) -> First:
    """The first steps of a trainer on a CPU, in a new process."""
    context = multiprocessing.get_context("forkserver")  # one server imports torch, once, and starts no thread
    context.set_forkserver_preload(["benchmarks.trainers"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(name, setting, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name}: the process that should make its first steps failed, see above") from None
    finally:
        process.join()


def report(name: str, setting: Setting, sender: Any) -> None:
    torch.set_num_threads(1)
    mine = psutil.Process()
    before = mine.memory_info().rss
    trainer, first = begin_here(name, setting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = peak - before + sum(worker.memory_full_info().uss for worker in mine.children())
    sender.send(first._replace(peak_mib=memory / MIB))
    trainer.close()
