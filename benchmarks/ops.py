"""Time the operations against a plain loop, and count what they launch: `python -m benchmarks.ops --out FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, method_cases, view_cases
from benchmarks.case import Case, Goal, Operation
from benchmarks.measure import Spread, Work, quartiles
from semi_fast.ops.door import has_compiled_views, has_kernel
from semi_fast.table import aligned

CASES: dict[str, Callable[[torch.device], list[Case]]] = {
    "rand_augment": view_cases.rand_augment,
    "draw_views": view_cases.draw_views,
    "bank_push": method_cases.bank_push,
    "pseudo_label": method_cases.pseudo_label,
    "masked_cross_entropy": method_cases.masked_cross_entropy,
    "embedding_align": method_cases.embedding_align,
}
KINDS = ("loop", "reference", "compiled", "kernel")
SPREADS = (
    *(f"{kind}_us" for kind in KINDS),
    "reference_captured_us",
    "kernel_captured_us",
    "loop_over_ours_ratio",
    "same_over_same_ratio",
    "strong_views_per_second",
)
COUNTS = ("dispatched_per_call", "views_per_call", "launches_per_call", "waits_per_call")
UNSTEADY = 0.10
"""How far the ratio of the same operation to itself may lie from 1 before no verdict is given."""


def find_operation(case: Case, device: torch.device) -> dict[str, Operation]:
    """The operation by kind: what the public function runs here, and beside compiled code the reference."""
    folder = f"semi_fast.ops.{case.operation}"
    public = getattr(import_module(folder), case.operation)
    compiled = "kernel" if has_kernel(device) else "cpu" if has_compiled_views(device) else ""
    if compiled and find_spec(f"{folder}.{compiled}"):
        return {"reference": find_reference(case), "kernel": public}
    return {"reference": public}


def find_reference(case: Case) -> Operation:
    """The form that is counted: the public function may look at values of a CPU tensor first, which is no wait."""
    return getattr(import_module(f"semi_fast.ops.{case.operation}.reference"), case.operation)


def row_of(case: Case, repeats: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """The row of a case, without where it comes from; one that fails says why, and leaves the others."""
    row: dict[str, Any] = {"operation": case.operation, "shape": case.shape}
    row |= {"ours": "", "status": "", "compile_seconds": ""} | spread_cells(SPREADS, {})
    row |= dict.fromkeys([*(f"{kind}_{c}" for kind in KINDS for c in COUNTS), "goal", "verdict"], "")
    try:
        found = measure_case(case, repeats, device, compiled)
    except Exception as error:  # noqa: BLE001, compilers raise what they like
        found = {"status": failure(error)}
    return row | {"status": "measured"} | found | {"n": repeats}


def measure_case(case: Case, repeats: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """What is measured of a case."""
    operations = find_operation(case, device)
    ours = "kernel" if "kernel" in operations else "reference"
    works = {"loop": case.loop} | {kind: case.work(operation) for kind, operation in operations.items()}
    row: dict[str, Any] = {"ours": ours}
    if compiled:
        works["compiled"] = case.work(torch.compile(operations["reference"], dynamic=False))
        row["compile_seconds"] = f"{first_call_seconds(works['compiled']):.1f}"
    seen = [kind for kind in works if kind != "compiled" or device.type == "cuda"]
    to_count = works | {"reference": case.work(find_reference(case))}
    counted = {kind: measure.count(to_count[kind], device) for kind in seen}
    works["same"] = case.work(operations[ours])
    for kind, one in operations.items() if device.type == "cuda" else ():
        try:
            works[f"{kind}_captured"] = measure.captured(case.work(one))
        except RuntimeError as error:
            row["status"] = f"{failure(error)} ({kind} is not captured)"

    seconds = measure.time_interleaved(works, repeats, device)
    found = {f"{kind}_us": quartiles([s * 1e6 for s in times]) for kind, times in seconds.items() if kind != "same"}
    found["loop_over_ours_ratio"] = measure.paired_ratio(seconds["loop"], seconds[ours])
    found["same_over_same_ratio"] = measure.paired_ratio(seconds["same"], seconds[ours])
    if case.strong_views:
        fastest = seconds.get("kernel_captured", seconds[ours])
        found["strong_views_per_second"] = quartiles([case.strong_views / s for s in fastest])
    row |= spread_cells(SPREADS, found)
    for kind, counts in counted.items():
        row |= {f"{kind}_{c}": f"{v:.1f}" for c, v in zip(COUNTS, counts, strict=True) if v is not None}
    row["goal"], row["verdict"] = judge(case.goals, found, device)
    return row


def spread_cells(names: Sequence[str], found: Mapping[str, Spread]) -> dict[str, str]:
    """The three columns of each name; empty for what was not measured."""
    row = {}
    for name in names:
        for part in Spread._fields:
            column = name if part == "median" else f"{name}_{part}"
            row[column] = digits(getattr(found[name], part)) if name in found else ""
    return row


def failure(error: BaseException) -> str:
    """What is written in place of a measurement."""
    return "failed: " + " ".join(f"{type(error).__name__}: {error}".split())[:200]


def digits(value: float) -> str:
    """At least four digits of a positive number, never as a power of ten."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def first_call_seconds(work: Work) -> float:
    start = time.perf_counter()
    work.run()
    return time.perf_counter() - start


def judge(goals: Sequence[Goal], found: dict[str, Spread], device: torch.device) -> tuple[str, str]:
    """(the goal in words, whether the whole interval meets it); both empty without one for this device."""
    for goal in goals:
        if goal.device != device.type or goal.column not in found:
            continue
        _, low, high = found[goal.column]
        words = f"{goal.column} {'>=' if goal.at_least else '<='} {goal.bound:,.15g}"
        same = found.get("same_over_same_ratio")
        if same and abs(same.median - 1) > UNSTEADY:
            return words, "inconclusive"
        met, missed = (
            (low >= goal.bound, high < goal.bound) if goal.at_least else (high <= goal.bound, low > goal.bound)
        )
        return words, "met" if met else "missed" if missed else "undecided"
    return "", ""


def screen(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal: times with the ratio to the loop, counts, and what the goals say."""
    times = [name for name in SPREADS if any(row[name] for row in rows) and name != "same_over_same_ratio"]
    counts = [f"{kind}_{c}" for kind in KINDS for c in COUNTS]
    counts = [name for name in counts if any(row[name] for row in rows)]
    names = {"loop_over_ours_ratio": "loop/ours", "strong_views_per_second": "strong views/s"}
    tables = [
        [["", *(names.get(name, name) for name in times)]],
        [["per call", *(c[: -len("_per_call")] for c in counts)]],
    ]
    lines = []
    for row in rows:
        name = f"{row['operation']} {row['shape']}"
        tables[0].append([name, *(interval(row, column) or "-" for column in times)])
        tables[1].append([name, *(row[column] or "-" for column in counts)])
        if row["goal"]:
            lines.append(f"{row['verdict']}: {row['goal']}, {interval(row, row['goal'].split()[0])}: {name}")
    return "\n\n".join([*map(aligned, tables), *(["\n".join(lines)] if lines else [])])


def interval(row: dict[str, Any], column: str) -> str:
    return f"{row[column]} ({row[f'{column}_low']}..{row[f'{column}_high']})" if row[column] else ""


def main(words: Sequence[str] | None = None) -> int:
    """Ends with 1 if a case failed."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.add_argument("--out", type=Path, help="the CSV, written row by row")
    parser.add_argument("--only", choices=CASES, help="one operation instead of all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile on a CPU too (minutes)")
    arguments = parser.parse_args(words)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {arguments.repeats}")
    try:
        device = measure.find_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)

    origin = measure.provenance(device, measure.command("benchmarks.ops", words))
    rows = []
    with measure.table(arguments.out) as write:
        for name in [arguments.only] if arguments.only else CASES:
            for case in CASES[name](device):
                rows.append(
                    row_of(case, arguments.repeats, device, arguments.compiled or device.type == "cuda") | origin
                )
                write(rows[-1])
                print(f"{case.name}: {rows[-1]['status']}", file=sys.stderr, flush=True)
    print(screen(rows))
    setting = f"torch {origin['torch']}, {origin['clock']}, n={arguments.repeats}; {origin['spread']}"
    print(f"{origin['hardware']}, {origin['threads']} thread, {setting}")
    return int(any(row["status"] != "measured" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
