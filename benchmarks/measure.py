"""How benchmarks measure: interleaved timing, counted operations, launches and waits, and where a number comes from."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from semi_fast.rundir import runlog

RESAMPLES = 2000
SPREAD = "quartiles over n repeats, interleaved; of a ratio the 95 % bootstrap interval of the median of paired ratios"


def nothing() -> None:
    """The reset of work that changes no state."""


@dataclass(frozen=True)
class Work:
    """What is timed: calls one after the other, from a state that `reset` restores outside the clock."""

    phases: Sequence[Callable[[], object]]
    reset: Callable[[], object] = nothing
    calls_per_phase: int = 1

    @property
    def calls(self) -> int:
        return len(self.phases) * self.calls_per_phase

    def run(self) -> None:
        """All of it once, from the start."""
        self.reset()
        for phase in self.phases:
            phase()


class Spread(NamedTuple):
    """A number and between what it lies."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Spread:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Median of slow / fast, repeat by repeat, with its 95 % bootstrap interval."""
    ratios = np.asarray(slow) / np.asarray(fast)
    picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    return Spread(float(np.median(ratios)), float(low), float(high))


def find_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda, a GPU with its index; ValueError for cuda where torch sees none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def clock_name(device: torch.device) -> str:
    return "CUDA events" if device.type == "cuda" else "process CPU time"


def cpu_seconds(phase: Callable[[], object]) -> Callable[[], float]:
    start = time.process_time()
    phase()
    seconds = time.process_time() - start
    return lambda: seconds


def gpu_seconds(phase: Callable[[], object]) -> Callable[[], float]:
    """Between two events around the call; read only when all is done, so that the clock adds no wait."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    phase()
    end.record()
    return lambda: start.elapsed_time(end) / 1000


def time_interleaved(works: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each work, one number a repeat, after one repeat that is thrown away.

    Works take turns phase by phase, in an order that turns round from phase to phase, so that whatever slows the
    machine down slows them alike. With phases of unequal number the shorter work ends earlier.
    """
    clock = gpu_seconds if device.type == "cuda" else cpu_seconds
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for work in works.values():
            work.reset()
        laps: dict[str, list[Callable[[], float]]] = {name: [] for name in works}
        for turn, phases in enumerate(zip_longest(*(work.phases for work in works.values()))):
            rows = [(name, phase) for name, phase in zip(works, phases, strict=True) if phase is not None]
            first = (turn + repeat) % len(rows)
            for name, phase in rows[first:] + rows[:first]:
                laps[name].append(clock(phase))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:
            for name, work in works.items():
                found[name].append(sum(lap() for lap in laps[name]) / work.calls)
    return found


def captured(work: Work) -> Work:
    """All phases as one replayed CUDA graph: what the calls cost inside a captured step, without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and buffers allocated before the capture
        work.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for phase in work.phases:
            phase()
    return Work([graph.replay], work.reset, work.calls)


class DispatchCounter(TorchDispatchMode):
    """Counts what reaches the device, by kind; on a CPU, where launches cannot be counted.

    Waits are values read back (`.item()`, `if tensor`), results whose size depends on values (nonzero, unique), and
    boolean indices. What torch.tensor reads from a list of scalar tensors does not pass here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dispatched = self.views = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatched += 1
        self.views += func.is_view
        self.waits += waits(func, args)
        return func(*args, **(kwargs or {}))


def waits(func: Any, args: Any) -> bool:
    """Whether the call would wait for a GPU."""
    if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class Counts(NamedTuple):
    """Means per call; None where this device cannot count it."""

    dispatched: float | None  # operations, views left out
    views: float | None
    launches: float | None
    waits: float


def count(work: Work, device: torch.device) -> Counts:
    """Operations or launches, and waits, of one call."""
    if device.type != "cuda":
        work.reset()
        with DispatchCounter() as seen:
            for phase in work.phases:
                phase()
        return Counts(
            (seen.dispatched - seen.views) / work.calls, seen.views / work.calls, None, seen.waits / work.calls
        )
    work.run()
    return Counts(None, None, count_launches(work) / work.calls, count_waits(work) / work.calls)


def count_launches(work: Work) -> int:
    """Kernels, copies and fills that the GPU runs."""
    work.reset()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for phase in work.phases:
            phase()
        torch.cuda.synchronize()
    events = [event for event in profile.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in events)


def count_waits(work: Work) -> int:
    """Calls that torch itself reports as waiting for the GPU."""
    work.reset()
    with sync_warnings() as caught:
        for phase in work.phases:
            phase()
    return sum("called a synchronizing" in str(one.message) for one in caught)


@contextmanager
def sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(before)


def command(module: str, words: Sequence[str], results: Sequence[str] = ("--out",)) -> str:
    """The command as anyone can repeat it: without the places of the `results`."""
    kept, skip = ["python", "-m", module], False
    for word in words:
        if skip or word.split("=")[0] in results:
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    return shlex.join(kept)


def gpu_state(device: torch.device) -> str:
    """Driver and clocks, libraries, and the arithmetic that torch may use."""
    query = ["nvidia-smi", f"--id={device.index or 0}", "--format=csv,noheader"]
    query += ["--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = "unknown"
    return (
        f"driver, clocks, power: {found}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"float32 matmul {torch.get_float32_matmul_precision()}, cuDNN TF32 {torch.backends.cudnn.allow_tf32}"
    )


def provenance(device: torch.device, repeated: str) -> dict[str, Any]:
    """The columns that every row of a benchmark ends with; a copy without its history has its commit in COMMIT."""
    versions, commit = runlog.versions(device), runlog.commit()
    return {
        "clock": clock_name(device),
        "spread": SPREAD,
        "date": date.today().isoformat(),
        "commit": (os.environ.get("COMMIT") or commit) if commit == "unknown" else commit,
        "device": device.type,
        "hardware": runlog.hardware(device),
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "triton": versions.get("triton", ""),
        "python": versions["python"],
        **({"gpu": gpu_state(device)} if device.type == "cuda" else {}),
        "command": repeated,
    }


Write = Callable[[Mapping[str, Any]], None]


@contextmanager
def table(path: Path | None, columns: Sequence[str] = ()) -> Iterator[Write]:
    """A new CSV that grows: what it gives takes a row, which is on the disk when that returns, so that a benchmark that
    is ended keeps all it knew. `columns` are those of the first row if not said; without a path nothing is written."""
    if path is None:
        yield lambda row: None
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] | None = None

        def write(row: Mapping[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, columns or list(row), restval="", lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())

        yield write


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with table(path) as write:
        for row in rows:
            write(row)
