"""How a trainer begins in a process of its own: seconds to its first steps, and the memory that they take."""

from __future__ import annotations

import multiprocessing
import resource
import time
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.trainers import Setting, run_steps, wait_for

MORE = 2  # steps after the first one, over which memory is looked at
MIB = 2**20
MEANING = (
    "Start: a new process, its imports left out, to the end of building and of the first step. Memory: what three "
    "steps take beyond the imports, on a GPU the most that torch had allocated, on a CPU the peak of the process and "
    "what its workers have of their own"
)


class First(NamedTuple):
    """How a trainer begins."""

    build_seconds: float
    """Reading the data, network, optimizer, loaders."""
    step_seconds: float
    """The first step, with compilation and capture."""
    peak_mib: float
    reserved_mib: float | None
    """On a GPU, what torch has taken from it."""


def begin(name: str, setting: Setting) -> First:
    """The first steps of a trainer, in a new process."""
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
    mine, device = psutil.Process(), setting.device
    before, start = mine.memory_info().rss, time.perf_counter()
    trainer = setting.open(name)
    wait_for(device)
    built = time.perf_counter()
    trainer.step()
    wait_for(device)
    first = time.perf_counter()
    run_steps(trainer, MORE)
    wait_for(device)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = peak - before + sum(worker.memory_full_info().uss for worker in mine.children()), None
    peak, reserved = (None if taken is None else taken / MIB for taken in memory)
    sender.send(First(built - start, first - built, peak or 0.0, reserved))
    trainer.close()
