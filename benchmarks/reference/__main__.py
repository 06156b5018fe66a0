"""Time a step of ours beside one of the released loop: `python -m benchmarks.reference --data DATA --out FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import first_steps, measure, ops, trainers
from benchmarks.case import Goal
from benchmarks.first_steps import First
from benchmarks.measure import Counts, Spread, Work, Write, paired_ratio, quartiles
from benchmarks.reference.loop import ReferenceLoop
from benchmarks.trainers import OURS, REFERENCE, TRAINERS, OurLoop, Seconds, Setting, Trainer, run_steps, timed
from semi_fast.table import aligned

SAME = "same"  # a second window of ours
SPREADS = (
    *("cpu_seconds", "wall_seconds", "cpu_ratio", "wall_ratio", "same_over_same_ratio"),
    *("evaluation_cpu_seconds", "evaluation_wall_seconds"),
)
FEW_CORES = 4
CLOCK = (
    "wall and CPU seconds per step, over windows that begin and end with an idle device and full queues; CPU time of "
    "the process, its threads and its loaders' processes. Verdicts by CPU time on a CPU and by wall on a GPU. Counts: "
    "without the reference's loaders, with our views. If no flag says otherwise the steps are of the phase after the "
    "warm-up, where every term takes part. " + first_steps.MEANING
)
VALUES = (
    *("loading_seconds", "selected_rows", "bank_fill"),
    *("dispatched_per_step", "views_per_step", "launches_per_step", "waits_per_step"),
    *("build_seconds", "first_step_seconds", "second_start_seconds", "peak_mib", "reserved_mib", "memory_share"),
)
ACTIVE = "--method.semi.warmup_epochs=0"
Rows = list[dict[str, Any]]


def goals(cores: int) -> tuple[Goal, ...]:
    """What ours must reach; a GPU fed by few cores leaves the reference's loaders further behind."""
    return Goal("cpu", "cpu_ratio", 1.15, True), Goal("cuda", "wall_ratio", 10 if cores <= FEW_CORES else 7, True)


def run_windows(loops: Mapping[str, Trainer], steps: int, repeats: int, device: torch.device) -> dict[str, list[Any]]:
    """Seconds per step of each window, and of ours a second one; they take turns, the first repeat is thrown away."""
    windows: dict[str, list[Seconds]] = {name: [] for name in (*loops, SAME)}
    names = list(windows)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            loop = loops[OURS if name == SAME else name]
            seconds = timed(lambda loop=loop: run_steps(loop, steps), device)
            if repeat:
                windows[name].append(Seconds(seconds.wall / steps, seconds.cpu / steps))
        print(f"window {repeat} of {repeats}", file=sys.stderr)
    return windows


def count(loop: Trainer, device: torch.device) -> Counts:
    """Operations or launches, and waits, of one step."""
    if isinstance(loop, ReferenceLoop):
        batch = loop.fetch()
        return measure.count(Work([lambda: loop.update(batch)]), device)
    return measure.count(Work([loop.step]), device)


def compare(name: str, windows: Mapping[str, Sequence[Seconds]], device: torch.device) -> dict[str, Spread]:
    """The spreads of a trainer's steps, and that of ours to itself by the clock of the verdict."""
    mine, base = windows[name], windows[REFERENCE]
    same, ours = ([window.of(device) for window in windows[one]] for one in (SAME, OURS))
    return {
        "cpu_seconds": quartiles([window.cpu for window in mine]),
        "wall_seconds": quartiles([window.wall for window in mine]),
        "cpu_ratio": paired_ratio([window.cpu for window in base], [window.cpu for window in mine]),
        "wall_ratio": paired_ratio([window.wall for window in base], [window.wall for window in mine]),
        "same_over_same_ratio": paired_ratio(same, ours),
    }


def measure_setting(setting: Setting, write: Write, *, before: int, steps: int, repeats: int, evaluations: int) -> None:
    """Rows of each trainer, given to `write` as soon as they are known: of its steps, its evaluations, its counts."""
    device, firsts, again, loops = setting.device, {}, {}, {}
    if device.type == "cpu":
        for name in TRAINERS:
            firsts[name] = first_steps.begin(name, setting)
            print(f"{name}: {first_steps_in_words(firsts[name])}", file=sys.stderr)
    for name in TRAINERS:  # the reference first
        loops[name], again[name] = first_steps.begin_here(name, setting)
        run_steps(loops[name], before)
    firsts = firsts or again
    reference = loops[REFERENCE]
    assert isinstance(reference, ReferenceLoop)
    loaded, done = reference.loading_seconds, reference.done
    windows = run_windows(loops, steps, repeats, device)
    loading = (reference.loading_seconds - loaded) / (reference.done - done)
    for name, loop in loops.items():
        ours, first = isinstance(loop, OurLoop), firsts[name]
        values = {
            "loading_seconds": "" if ours else ops.digits(loading),
            "selected_rows": "" if ours else f"{reference.meters['mask'] * 2 * unlabeled(setting):.0f}",
            "bank_fill": "" if ours else f"{float((reference.bank.confidences > 0).float().mean()):.3f}",
            "build_seconds": f"{first.build_seconds:.2f}",
            "first_step_seconds": f"{first.step_seconds:.2f}",
            "second_start_seconds": f"{again[name].build_seconds + again[name].step_seconds:.2f}",
            **memory(first, firsts[REFERENCE]),
        }
        write(row_of("steps", name, loop, compare(name, windows, device), values, setting))
    for name, loop in loops.items() if evaluations else ():
        taken = [timed(loop.evaluate, device) for _ in range(evaluations)]
        found = {"evaluation_cpu_seconds": quartiles([one.cpu for one in taken])}
        found["evaluation_wall_seconds"] = quartiles([one.wall for one in taken])
        write(row_of("evaluation", name, loop, found, {}, setting))
    for name, loop in loops.items():
        counted = count(loop, device)._asdict()
        values = {f"{c}_per_step": "" if v is None else f"{v:.1f}" for c, v in counted.items()}
        write(row_of("counts", name, loop, {}, values, setting))
    for loop in loops.values():
        loop.close()


def memory(first: First, of_reference: First) -> dict[str, str]:
    """Of the first steps, as far as it is counted."""
    found = {"peak_mib": first.peak_mib, "reserved_mib": first.reserved_mib}
    row = {name: f"{value:.0f}" for name, value in found.items() if value is not None}
    if first.peak_mib is not None and of_reference.peak_mib is not None:
        row["memory_share"] = f"{first.peak_mib / of_reference.peak_mib:.3f}"
    return row


def row_of(
    kind: str, name: str, loop: Trainer, found: Mapping[str, Spread], values: Mapping[str, str], setting: Setting
) -> dict[str, Any]:
    ours = isinstance(loop, OurLoop)
    row: dict[str, Any] = {"kind": kind, "trainer": name, **setting.columns}
    row["precision"] = setting.config.precision if ours else "fp32"
    row["level"] = loop.run.program.prepared["level"] if isinstance(loop, OurLoop) else "eager"
    row |= ops.spread_cells(SPREADS, found)
    row |= dict.fromkeys(VALUES, "") | dict(values)
    judged = goals(os.cpu_count() or 1) if ours else ()
    row["goal"], row["verdict"] = ops.judge(judged, dict(found), setting.device)
    return row


def unlabeled(setting: Setting) -> int:
    return setting.config.batch.labeled * setting.config.batch.unlabeled_ratio


def first_steps_in_words(first: First) -> str:
    return f"built in {first.build_seconds:.2f} s, first step {first.step_seconds:.2f} s, {first.peak_mib:.0f} MiB"


def screen(rows: Rows) -> str:
    """The rows for a terminal, and what the goal says."""
    columns = {
        "cpu_seconds": "CPU s/step",
        "wall_seconds": "wall s/step",
        "cpu_ratio": f"CPU, {REFERENCE}/this",
        "wall_ratio": f"wall, {REFERENCE}/this",
    }
    ends = {
        "dispatched_per_step": "dispatched",
        "launches_per_step": "launches",
        "waits_per_step": "waits",
        "peak_mib": "peak MiB",
        "evaluation_cpu_seconds": "evaluation CPU s",
        "evaluation_wall_seconds": "wall s",
    }
    table, lines = [["", "model", "precision", "level", *columns.values(), *ends.values()]], []
    for row in (row for row in rows if row["kind"] == "steps"):
        mine = [other for other in rows if other["trainer"] == row["trainer"]]
        every = {column: next((other[column] for other in mine if other[column]), "-") for column in ends}
        numbers = [ops.interval(row, column) for column in columns]
        table.append([*(row[c] for c in ("trainer", "model", "precision", "level")), *numbers, *every.values()])
        if row["goal"]:
            lines.append(f"{row['verdict']}: {row['goal']}, {ops.interval(row, row['goal'].split()[0])}")
            lines.append(f"ours to itself {ops.interval(row, 'same_over_same_ratio')}")
    return "\n\n".join([aligned(table), "\n".join(lines)])


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reference", description=f"{__doc__} {trainers.HELP}", allow_abbrev=False
    )
    parser.add_argument(
        "--data", type=Path, help="a prepared data set; else noise of 32 pixels, for the method's options"
    )
    parser.add_argument("--out", type=Path, help="the CSV, written row by row")
    parser.add_argument("--steps", type=int, help="of a window; 2 on a CPU, else 50")
    parser.add_argument("--repeats", type=int, default=15, help="windows of each")
    parser.add_argument("--before", type=int, help="steps of each before the first window, and after its first three")
    parser.add_argument("--evaluations", type=int, default=1, help="of the test set by each; 0 for none")
    parser.add_argument("--workers", type=int, help="processes of each of the reference's loaders; 0 on a CPU, else 4")
    parser.add_argument("--small", action="store_true", help="less noise, for trying it out")
    arguments, flags = parser.parse_known_args(words)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        data, defaults = stack.enter_context(trainers.data_or_noise(arguments.data, small=arguments.small))
        try:
            setting = trainers.settings(data, flags, arguments.workers, (ACTIVE, *defaults))
        except ValueError as error:
            parser.error(str(error))
        steps = arguments.steps if arguments.steps is not None else 2 if setting.device.type == "cpu" else 50
        before = steps if arguments.before is None else arguments.before
        if min(steps, arguments.repeats) < 1 or min(before, arguments.evaluations) < 0:
            parser.error("--steps and --repeats must be positive, --before and --evaluations not negative")
        origin = measure.provenance(setting.device, trainers.repeated("benchmarks.reference", words))
        origin = {"n": arguments.repeats, "steps_per_window": steps, "steps_before": before, **origin, "clock": CLOCK}
        write, rows = stack.enter_context(measure.table(arguments.out)), []

        def take(row: Mapping[str, Any]) -> None:
            rows.append({**row, **origin})
            write(rows[-1])
            print(f"{row['trainer']}: {row['kind']} {row['wall_seconds']}".strip(), file=sys.stderr, flush=True)

        numbers = {"repeats": arguments.repeats, "evaluations": arguments.evaluations}
        measure_setting(setting, take, before=before, steps=steps, **numbers)
    print(screen(rows))
    print(f"{origin['hardware']}, {origin['threads']} thread, n={arguments.repeats}; {origin['spread']}")


if __name__ == "__main__":
    main()
