"""Time whole steps at every level, precision, batch and model: `python -m benchmarks.step --out FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import measure, ops, step_cases
from benchmarks.case import PAPER_EVALUATIONS, PAPER_STEPS, Goal
from benchmarks.measure import Spread, Work, Write, paired_ratio, quartiles
from benchmarks.step_cases import FLOOR_MS, PARTS, TRAFFIC, Peak, Rung, Runner, Shape
from semi_fast.prepared.manifest import Manifest
from semi_fast.table import aligned

MODELS = {"wrn_28_2": (32,), "resnet50_cifar": (32, 64)}
RATIOS = {256: 1, 448: 2}
"""Rows of a step of 64 labeled images: how many unlabeled ones there are to each of them."""
SPREADS = (
    "step_ms",
    "over_first_ratio",
    "same_over_same_ratio",
    *(f"{part}_ms" for part in PARTS),
    "views_share",
    "evaluation_ms",
    "evaluation_share",
    "paper_minutes",
)
VALUES = (
    *("images_per_second", "rows_per_second", "forward_gflop_per_image", "step_tflop", "tflop_per_second"),
    *("counted_traffic", "gb_per_second", "floor_percent", "dispatched", "launches", "waits"),
    *("peak_mib", "reserved_mib", "ready_seconds"),
)
STEADY_STEPS = 3  # after the first one, before anything is timed
GOALS = {
    ("wrn_28_2", 32, 256): {
        "graph-compile-bf16": (
            Goal("cuda", "step_ms", 2.6, False),
            Goal("cuda", "waits", 0, False),
            Goal("cuda", "views_share", 0.05, False),
            Goal("cuda", "evaluation_share", 0.02, False),
            Goal("cuda", "paper_minutes", 12, False),
            Goal("cuda", "launches", 330, False),
        ),
        "eager-bf16": (Goal("cuda", "over_first_ratio", 2, True),),
    },
}
"""By (model, side, rows) and rung."""
FAILURES = (ValueError, RuntimeError, OSError)
Rows = list[dict[str, Any]]
Found = tuple[dict[str, Spread], dict[str, str]]
"""The spreads and the values of a row."""


class Plan(NamedTuple):
    """How a cell is measured."""

    device: torch.device
    repeats: int
    steps: int
    """Of one window."""
    cut: tuple[str, ...]
    """Names of the rungs whose steps are cut into parts."""


class StepCell:
    """The rungs of one shape: those that step, and what their rows need."""

    def __init__(self, shape: Shape, manifest: Manifest, plan: Plan, stack: ExitStack):
        self.shape, self.manifest, self.plan, self.stack = shape, manifest, plan, stack
        self.runners: dict[Rung, Runner] = {}
        self.seconds: dict[Rung, float] = {}  # of a step

    def step(self, rung: Rung) -> Found:
        """Bring it to its level, take the first steps, look for waits, and time it in turns with the first rung.

        Its peak memory is what it takes from building on: compilers, searches and pixels too.
        """
        device, peak = self.plan.device, Peak(self.plan.device)
        runner = Runner(step_cases.open_rung(rung, self.shape, self.manifest, device, self.stack))
        for _ in range(1 + STEADY_STEPS):
            runner.step()
        step_cases.wait(device)
        memory, work = peak.read(), runner.window(self.plan.steps)
        waits = count_waits(runner, self.plan.steps) if device.type == "cuda" else ""
        first = next(iter(self.runners.values()), runner).window(self.plan.steps)
        seconds = measure.time_interleaved({"this": work, "first": first, "same": first}, self.plan.repeats, device)
        self.runners[rung], self.seconds[rung] = runner, median(seconds["this"])
        found = {
            "step_ms": quartiles([1000 * s for s in seconds["this"]]),
            "over_first_ratio": paired_ratio(seconds["this"], seconds["first"]),
            "same_over_same_ratio": paired_ratio(seconds["same"], seconds["first"]),
        }
        return found, {"waits": waits, **self.rates(rung), **in_mib(memory)}

    def rates(self, rung: Rung) -> dict[str, str]:
        """What a step's seconds mean, beside counted work and a modelled floor."""
        shape, program, seconds = self.shape, self.runners[rung].program, self.seconds[rung]
        at, flop = (shape.model, shape.side, shape.rows), step_cases.forward_flop(program)
        traffic, floor, device = TRAFFIC.get(at, {}).get(rung.traffic), FLOOR_MS.get(at), self.plan.device
        h200 = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
        return {
            "images_per_second": ops.digits(program.layout.images / seconds),
            "rows_per_second": ops.digits(shape.rows / seconds),
            "forward_gflop_per_image": f"{flop / 1e9:.4f}",
            "step_tflop": f"{3 * flop * shape.rows / 1e12:.4g}",
            "tflop_per_second": ops.digits(3 * flop * shape.rows / seconds / 1e12),
            "counted_traffic": rung.traffic if traffic else "",
            "gb_per_second": ops.digits(traffic / seconds) if traffic else "",
            "floor_percent": ops.digits(floor / seconds / 10) if floor and h200 else "",
            "ready_seconds": f"{program.prepared['seconds']}",
        }

    def parts(self, rung: Rung) -> Found:
        """Its step cut into parts: how much longer it takes up to the end of each."""
        works = step_cases.part_works(self.runners[rung].program, self.plan.steps)
        seconds = measure.time_interleaved(works, self.plan.repeats, self.plan.device)
        found, before = {}, np.zeros(self.plan.repeats)
        for part, until in seconds.items():
            found[f"{part}_ms"] = quartiles((1000 * (np.asarray(until) - before)).tolist())
            before = np.asarray(until)
        share = (np.asarray(seconds["views"]) - seconds["rows"]) / seconds["count"]
        return found | {"views_share": quartiles(share.tolist())}, {}

    def evaluation(self, rung: Rung) -> Found:
        """Whole evaluations of the test set, from an idle device to the numbers on the host; and a published run."""
        program, device = self.runners[rung].program, self.plan.device
        work = Work([program.evaluations[0].confusions])
        repeats = self.plan.repeats if device.type == "cuda" else 1
        seconds = measure.time_interleaved({"evaluation": work}, repeats, device)["evaluation"]
        steps, ready = PAPER_STEPS * self.seconds[rung], program.prepared["seconds"]
        share = [PAPER_EVALUATIONS * s / (steps + PAPER_EVALUATIONS * s) for s in seconds]
        minutes = [(steps + PAPER_EVALUATIONS * s + ready) / 60 for s in seconds]
        found = {"evaluation_ms": quartiles([1000 * s for s in seconds])}
        return found | {"evaluation_share": quartiles(share), "paper_minutes": quartiles(minutes)}, {}

    def launches(self, rung: Rung) -> Found:
        """On a GPU what it runs; on a CPU the operations that are dispatched, of compiled code none.

        What has been profiled stays attached to the process, as graphs and its end do not get on, and may slow down
        what comes later.
        """
        os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
        work = Work([self.runners[rung].step])
        if self.plan.device.type == "cuda":
            return {}, {"launches": f"{measure.count_launches(work)}"}
        return {}, {"dispatched": f"{measure.count(work, self.plan.device).dispatched:.0f}"}


KINDS: dict[str, Callable[[StepCell, Rung], Found]] = {
    "step": StepCell.step,
    "parts": StepCell.parts,
    "evaluation": StepCell.evaluation,
    "launches": StepCell.launches,
}
"""Of rows."""


def measure_cell(shape: Shape, rungs: Sequence[Rung], manifest: Manifest, plan: Plan, write: Write) -> None:
    """Rungs one after the other; `write` is given every row as soon as it is known.

    Those that are cut come first, with their parts and evaluations; what is profiled comes after all that is timed. One
    that fails, or cannot be carried out, is a row that says why and ends nothing else.
    """
    step_cases.release(plan.device)
    cut = [rung for rung in rungs if rung.name in plan.cut]
    with ExitStack() as stack:
        cell = StepCell(shape, manifest, plan, stack)
        rest = [rung for rung in rungs if rung not in cut]
        turns = [(kind, cut) for kind in KINDS if kind != "launches"] + [("step", rest), ("launches", [*cut, *rest])]
        for kind, group in turns:
            for rung in group:
                hidden = kind == "launches" and rung.compiled and plan.device.type == "cpu"
                if kind == "step":
                    write(row_of(kind, rung, cell, rung.obstacle(plan.device)))
                elif rung in cell.runners and not hidden:
                    write(row_of(kind, rung, cell))


def row_of(kind: str, rung: Rung, cell: StepCell, obstacle: str = "") -> dict[str, Any]:
    """One kind of row, measured unless there is an obstacle."""
    found: dict[str, Spread] = {}
    values: dict[str, str] = {}
    status = obstacle
    if not obstacle:
        try:
            found, values = KINDS[kind](cell, rung)
            status = "measured"
        except FAILURES as error:
            status = ops.failure(error)
    shape, plan = cell.shape, cell.plan
    row: dict[str, Any] = {"kind": kind, "model": shape.model, "side": shape.side, "rows": shape.rows}
    row |= {"rung": rung.name, "level": rung.level, "compiled": rung.compiled, "precision": rung.precision}
    row |= {"channels_last": rung.channels_last, "status": status}
    row |= ops.spread_cells(SPREADS, found)
    row |= dict.fromkeys(VALUES, "") | values
    exact = {name: Spread(*[float(values[name])] * 3) for name in ("waits", "launches") if values.get(name)}
    goals = GOALS.get((shape.model, shape.side, shape.rows), {}).get(rung.name, ())
    judged = [ops.judge([goal], found | exact, plan.device) for goal in goals]
    row["goal"], row["verdict"] = ("; ".join(pair[i] for pair in judged if pair[i]) for i in (0, 1))
    return row | {"n": plan.repeats, "steps_per_window": plan.steps}


def in_mib(memory: tuple[float, float] | None) -> dict[str, str]:
    return {"peak_mib": f"{memory[0]:.0f}", "reserved_mib": f"{memory[1]:.0f}"} if memory else {}


def count_waits(runner: Runner, steps: int) -> str:
    """Calls in so many steps that torch reports as waiting for the GPU."""
    return f"{measure.count_waits(Work([runner.step] * steps))}"


def screen(rows: Rows) -> str:
    """The rows for a terminal: the steps, their parts, and what the goals say."""
    head = ["", "ms", "images/s", "TFLOP/s", "% of floor", "launches", "waits", "peak MiB", "ready s", "x first"]
    names = ("images_per_second", "tflop_per_second", "floor_percent", "launches", "waits", "peak_mib", "ready_seconds")
    table, parts, lines = [head], [["part, ms", *PARTS, "evaluation"]], []
    for row in (row for row in rows if row["kind"] == "step" or row["status"] != "measured"):
        name = named(row)
        if row["status"] != "measured":
            lines.append(f"{name}: {row['kind']} left out, {row['status']}")
            continue
        mine = [other for other in rows if named(other) == name]
        every = {c: next((str(other[c]) for other in mine if other[c] != ""), "") for c in row}
        table.append([name, ops.interval(row, "step_ms"), *(every[c] for c in names)])
        table[-1].append(ops.interval(row, "over_first_ratio"))
        if every["count_ms"]:
            parts.append([name, *(every[f"{part}_ms"] for part in PARTS), every["evaluation_ms"]])
        lines += [f"{name}: {other['goal']}: {other['verdict']}" for other in mine if other["goal"]]
        if abs(float(row["same_over_same_ratio"]) - 1) > ops.UNSTEADY:
            lines.append(f"{name}: ratios are inconclusive, the same step over itself is {row['same_over_same_ratio']}")
    tables = [aligned(one) for one in (table, parts) if len(one) > 1]
    return "\n\n".join([*tables, *(["\n".join(lines)] if lines else [])])


def named(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['side']} px {row['rows']} rows {row['rung']}"


def chosen(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """The names of a flag, in the order of `known`; ValueError for another."""
    names = text.split(",") if text else list(default)
    if set(names) - set(known):
        raise ValueError(f"must be some of {','.join(known)}; got {text}")
    return [name for name in known if name in names]


def cuts(rungs: Sequence[Rung], device: torch.device) -> tuple[str, ...]:
    """Which rungs are cut into parts if nobody says: of those that can be, the first one and the first eager one."""
    able = [rung for rung in rungs if not rung.obstacle(device)]
    eager = [rung for rung in able if rung.level == "eager"]
    return tuple(dict.fromkeys(rung.name for rung in (*able[:1], *eager[:1])))


def main(words: Sequence[str] | None = None) -> int:
    """Ends with 1 if anything that can be carried out failed."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--out", type=Path, help="the CSV, written row by row")
    parser.add_argument("--data", type=Path, help="a prepared data set, for the models that take its size; else noise")
    parser.add_argument("--model", default="wrn_28_2", help="some of timm's or ours, with commas")
    parser.add_argument("--side", type=int, help="of the images, in pixels; else 32, and for resnet50_cifar 64 too")
    parser.add_argument("--rows", default="256", help="of a step: 256,448 (64 + 3 x 64 and 64 + 3 x 128 images)")
    parser.add_argument(
        "--labeled", type=int, default=64, help="labeled images instead of 64, the ratio as with --rows"
    )
    parser.add_argument("--precision", default="bf16", help="beside fp32: bf16,fp16")
    parser.add_argument("--rungs", help="names, with commas; else all, without torch.compile on a CPU")
    parser.add_argument(
        "--cut", help="rungs whose steps are cut into parts; else the first and the first eager; or none"
    )
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, help="of a window; 20 on a GPU, 1 on a CPU")
    parser.add_argument("--small", action="store_true", help="few synthetic images, for trying it out")
    parser.add_argument("--beside", type=int, default=0, help="how many others like this run meanwhile, for the rows")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(words)
    if min(arguments.repeats, arguments.labeled, arguments.steps or 1) < 1:
        parser.error("--repeats, --labeled and --steps must be at least 1")
    torch.set_num_threads(1)
    try:
        device = measure.find_device(arguments.device)
        cuda = device.type == "cuda"
        precisions = chosen(arguments.precision, ("bf16", "fp16", "fp32"), ())
        rungs = {rung.name: rung for rung in step_cases.ladder(precisions)}
        quick = [name for name, rung in rungs.items() if cuda or rung.level != "compile"]
        names = chosen(arguments.rungs, list(rungs), quick)
        cut = cuts([rungs[name] for name in names], device)
        cut = () if arguments.cut == "none" else tuple(chosen(arguments.cut, names, cut))
        plan = Plan(
            device,
            arguments.repeats,
            arguments.steps or (20 if cuda else 1),
            cut,
        )
        ratios = [RATIOS[int(rows)] for rows in chosen(arguments.rows, list(map(str, RATIOS)), ())]
    except ValueError as error:
        parser.error(str(error))

    if not arguments.rungs and len(quick) < len(rungs):
        left_out = ", ".join(name for name in rungs if name not in quick)
        print(f"left out: {left_out}, which starts slowly on a CPU; name it with --rungs", file=sys.stderr)
    origin = measure.provenance(device, measure.command("benchmarks.step", words, ("--out", "--data")))
    rows: Rows = []
    with measure.table(arguments.out) as write:
        for model in arguments.model.split(","):
            for side in [arguments.side] if arguments.side else MODELS.get(model, (32,)):
                for ratio in ratios:
                    shape = Shape(model, side, arguments.labeled, ratio)
                    with step_cases.data_of(shape, arguments.data, small=arguments.small) as manifest:
                        own = {"data": f"{manifest.dataset}, sha256 {manifest.data_sha256[:12]}"}
                        own |= {"beside": arguments.beside} | origin

                        def take(row: Mapping[str, Any], own: Mapping[str, Any] = own) -> None:
                            rows.append({**row, **own})
                            write(rows[-1])
                            said = f"{row['kind']}: {row['status']} {row['step_ms']}"
                            print(f"{named(row)}: {said.strip()}", file=sys.stderr, flush=True)

                        measure_cell(shape, [rungs[name] for name in names], manifest, plan, take)
    print(screen(rows))
    setting = (
        f"torch {origin['torch']}, {origin['clock']}, n={plan.repeats} windows of {plan.steps}; {origin['spread']}"
    )
    print(f"{origin['hardware']}, {origin['threads']} thread, {setting}")
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
