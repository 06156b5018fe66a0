"""Compare pipelines by normalised views per second and per CPU-second: `python -m benchmarks.pipelines --out FILE`."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks import measure, ops
from benchmarks.measure import Spread, paired_ratio, quartiles
from benchmarks.pipeline_cases import BASELINE, CPU, PIPELINES, Data, Pipeline, real_data, synthetic_data
from semi_fast.screen import tolerate_closed_pipes
from semi_fast.table import aligned

SAME = "same"  # a second one of the baseline
SPREADS = ("wall_per_second", "per_cpu_second", "wall_ratio", "cpu_ratio", "same_over_same_ratio")
FIRST_STEPS = 3  # of a fresh process, over which its memory is looked at
WINDOW_SECONDS = 0.004
QUIET_SHARE, QUIET_WINDOWS = 0.1, 3
"""Nothing is made any more when so many windows in a row use less than this share of a core."""
CLOCK = (
    "wall, and CPU time of the process, its threads and its workers; a lap ends when all that it took is made again. "
    "First batch: a new process, its imports of torch left out. Memory: peak of that process over what it began with, "
    "and what its workers have of their own"
)
Rows = list[dict[str, Any]]
Batches = Generator[Any]


class Lap(NamedTuple):
    """What one turn of a pipeline gave and took."""

    steps: int
    wall_seconds: float
    cpu_seconds: float


class First(NamedTuple):
    """How a pipeline begins."""

    batch_seconds: float
    added_mib: float


def process_clock(pid: int) -> int:
    """Linux's clock of the CPU time of a process and its threads, as clock_getcpuclockid(3) gives it."""
    return (~pid << 3) | 2


def cpu_seconds() -> float:
    """Of this process and its children, those that have ended and those that run."""
    running = sum(time.clock_gettime(process_clock(child.pid or 0)) for child in multiprocessing.active_children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + running + ended.ru_utime + ended.ru_stime


def wait_until_quiet() -> float:
    """Until threads and workers have filled their queues; the time at which they had."""
    quiet, since, before = 0, time.perf_counter(), cpu_seconds()
    while quiet < QUIET_WINDOWS:
        time.sleep(WINDOW_SECONDS)
        now = cpu_seconds()
        if now - before > QUIET_SHARE * WINDOW_SECONDS:
            quiet, since = 0, time.perf_counter()
        else:
            quiet += 1
        before = now
    return since


def run_lap(batches: Batches, seconds: float) -> Lap:
    """Steps for about so long, from full queues to full queues: as many batches are made as are taken."""
    steps, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() < wall + seconds:
        next(batches)
        steps += 1
    end = time.perf_counter()
    return Lap(steps, max(end, wait_until_quiet()) - wall, cpu_seconds() - cpu)


def run_laps(opened: Mapping[str, Batches], repeats: int, seconds: float) -> dict[str, list[Lap]]:
    """The laps of each pipeline; they take turns, in an order that turns round, and the first repeat is thrown away."""
    laps: dict[str, list[Lap]] = {name: [] for name in opened}
    names = list(opened)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            lap = run_lap(opened[name], seconds)
            if repeat:
                laps[name].append(lap)
    return laps


def begin(name: str, data: Data) -> First:
    """Of a pipeline in a new process that has imported torch, but not the pipeline's own libraries."""
    context = multiprocessing.get_context("forkserver")  # one server imports torch, once, and starts no thread
    context.set_forkserver_preload(["benchmarks.pipeline_cases"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report_first, args=(name, data, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{name}: the process that should make its first batch failed, see above") from None
    finally:
        process.join()


def report_first(name: str, data: Data, sender: Any) -> None:
    torch.set_num_threads(1)
    mine = psutil.Process()
    before, start = mine.memory_info().rss, time.perf_counter()
    batches = PIPELINES[name].open(data)
    next(batches)
    seconds = time.perf_counter() - start
    for _ in range(FIRST_STEPS - 1):
        next(batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = sum(worker.memory_full_info().uss for worker in mine.children())
    sender.send(First(seconds, (peak - before + workers) / 2**20))
    batches.close()


def measure_data(data: Data, names: Sequence[str], repeats: int, seconds: float) -> Rows:
    """A row for each of the pipelines on one data set."""
    installed = [name for name in names if PIPELINES[name].versions is not None]
    firsts = {}
    for name in installed:
        firsts[name] = begin(name, data)
        print(f"{name}: first batch after {firsts[name].batch_seconds:.2f} s", file=sys.stderr)
    with ExitStack() as stack:
        opened: dict[str, Batches] = {}
        for name in (*installed, SAME):  # those with workers come first: they are forked before there are threads
            batches = PIPELINES[BASELINE if name == SAME else name].open(data)
            opened[name] = stack.enter_context(closing(batches))
            next(batches)
        wait_until_quiet()
        laps = run_laps(opened, repeats, seconds)
    rows = []
    for name in names:
        pipeline = PIPELINES[name]
        row = {"pipeline": name, "label": pipeline.label, "side": data.side, "unit": pipeline.unit}
        row["status"] = "measured" if name in firsts else "not installed"
        found = compare(pipeline, laps[name], laps) if name in firsts else {}
        row |= ops.spread_cells(SPREADS, found)
        first = firsts.get(name)
        row["first_batch_seconds"] = f"{first.batch_seconds:.2f}" if first else ""
        row["added_mib"] = f"{first.added_mib:.0f}" if first else ""
        row["steps_per_lap"] = f"{quartiles([lap.steps for lap in laps[name]]).median:.0f}" if first else ""
        row["goal"], row["verdict"] = ops.judge([pipeline.goal] if pipeline.goal and found else [], found, CPU)
        row["n"] = repeats
        row["data"] = f"{data.raw.dataset}, {data.raw.length('train')} images, sha256 {data.raw.data_sha256[:12]}"
        row["libraries"] = pipeline.versions or ""
        rows.append(row)
    return rows


def compare(pipeline: Pipeline, mine: Sequence[Lap], laps: Mapping[str, Sequence[Lap]]) -> dict[str, Spread]:
    """The spreads of a pipeline; ratios to the baseline only where views are made."""
    base, same = laps[BASELINE], laps[SAME]
    found = {
        "wall_per_second": quartiles([pipeline.per_step * lap.steps / lap.wall_seconds for lap in mine]),
        "per_cpu_second": quartiles([pipeline.per_step * lap.steps / lap.cpu_seconds for lap in mine]),
    }
    if pipeline.unit == "views":
        found["wall_ratio"] = paired_ratio(wall_per_step(base), wall_per_step(mine))
        found["cpu_ratio"] = paired_ratio(cpu_per_step(base), cpu_per_step(mine))
        found["same_over_same_ratio"] = paired_ratio(cpu_per_step(same), cpu_per_step(base))
    return found


def wall_per_step(laps: Sequence[Lap]) -> list[float]:
    return [lap.wall_seconds / lap.steps for lap in laps]


def cpu_per_step(laps: Sequence[Lap]) -> list[float]:
    return [lap.cpu_seconds / lap.steps for lap in laps]


def screen(rows: Rows) -> str:
    """The rows for a terminal, and what the goals say."""
    columns = {
        "wall_per_second": "per second",
        "per_cpu_second": "per CPU-second",
        "wall_ratio": f"wall/{BASELINE}",
        "cpu_ratio": f"CPU/{BASELINE}",
    }
    table, lines = [["", "side", "unit", *columns.values(), "first batch s", "memory MiB"]], []
    for row in rows:
        name = row["label"] if row["status"] == "measured" else f"{row['label']}: {row['status']}"
        numbers = [ops.interval(row, column) or "-" for column in columns]
        ends = [row[column] or "-" for column in ("first_batch_seconds", "added_mib")]
        table.append([name, str(row["side"]), row["unit"], *numbers, *ends])
        if row["goal"]:
            lines.append(f"{row['verdict']}: {row['goal']}, {ops.interval(row, 'cpu_ratio')}: {name}, {row['side']} px")
    return "\n\n".join([aligned(table), *(["\n".join(lines)] if lines else [])])


def draw_chart(rows: Rows, path: Path) -> None:
    """Bars of views per CPU-second, the longest on top, with quartiles; what only decodes is in the CSV."""
    from matplotlib.figure import Figure

    sides = sorted({row["side"] for row in rows})
    bars = {side: [r for r in rows if r["side"] == side and r["cpu_ratio"]] for side in sides}
    heights = [0.42 * len(bars[side]) + 0.5 for side in sides]
    figure = Figure(figsize=(9, sum(heights) + 1.3), layout="constrained")
    panels = figure.subplots(len(sides), 1, squeeze=False, height_ratios=heights)[:, 0]
    for side, axes in zip(sides, panels, strict=True):
        shown = sorted(bars[side], key=lambda row: float(row["per_cpu_second"]))
        rates = [[float(r[f"per_cpu_second{part}"]) for r in shown] for part in ("", "_low", "_high")]
        whiskers = [[abs(a - b) for a, b in zip(rates[0], ends, strict=True)] for ends in rates[1:]]
        colours = ["#2a6f97" if PIPELINES[r["pipeline"]].ours else "#adb5bd" for r in shown]
        axes.barh([r["label"] for r in shown], rates[0], xerr=whiskers, color=colours, height=0.7, capsize=3)
        for place, (row, end) in enumerate(zip(shown, rates[2], strict=True)):
            text = f"{float(row['per_cpu_second']):,.0f}  ({float(row['cpu_ratio']):.1f}x)"
            axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.25 * max(rates[2]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(f"{side} x {side} pixels", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Augmented views (labeled, weak, 2 strong) per CPU-second", x=0.01, ha="left")
    origin = rows[0]
    figure.supxlabel(
        f"Bars: median and quartiles of n={origin['n']}. (x): CPU time against {PIPELINES[BASELINE].label}.\n"
        f"{origin['hardware']}, {origin['threads']} thread, {origin['date']}, {origin['commit']}",
        fontsize="small",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)


def repeated(words: Sequence[str]) -> str:
    """The command, with the name of the data set's folder alone."""
    before = ["", *words[:-1]]
    named = [Path(word).name if flag == "--data" else word for flag, word in zip(before, words, strict=True)]
    return measure.command("benchmarks.pipelines", named, ("--out", "--chart"))


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipelines", description=__doc__)
    parser.add_argument("--out", type=Path, help="the CSV to write")
    parser.add_argument("--chart", type=Path, help="the PNG to write")
    parser.add_argument("--data", type=Path, help="a data set prepared as resident,ffcv,dali; else synthetic images")
    parser.add_argument("--sides", default="32", help="of synthetic images, in pixels: 32,64,96")
    parser.add_argument("--images", type=int, help="how many; 50000 of 32 pixels, as many bytes of others")
    parser.add_argument("--only", help=f"some of {','.join(PIPELINES)}; {BASELINE} always is measured")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one lap")
    arguments = parser.parse_args(words)
    only = set((arguments.only or ",".join(PIPELINES)).split(",")) | {BASELINE}
    if only - set(PIPELINES):
        parser.error(f"--only must be some of {','.join(PIPELINES)}; got {arguments.only}")
    if arguments.repeats < 1 or arguments.seconds <= 0:
        parser.error(f"--repeats and --seconds must be positive; got {arguments.repeats} and {arguments.seconds}")
    torch.set_num_threads(1)

    origin = measure.provenance(CPU, repeated(words)) | {"clock": CLOCK}
    names = [name for name in PIPELINES if name in only]
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in ["of the data"] if arguments.data else arguments.sides.split(","):
            if arguments.data:
                data = real_data(Path(folder), arguments.data)
            else:
                data = synthetic_data(Path(folder), int(side), arguments.images or 50_000 * 32**2 // int(side) ** 2)
            rows += [row | origin for row in measure_data(data, names, arguments.repeats, arguments.seconds)]
    print(screen(rows))
    print(f"{origin['hardware']}, {origin['threads']} thread, n={arguments.repeats}; {origin['spread']}\n{CLOCK}")
    if arguments.out:
        measure.write_csv(arguments.out, rows)
    if arguments.chart:
        draw_chart(rows, arguments.chart)


if __name__ == "__main__":
    with tolerate_closed_pipes():
        main()
