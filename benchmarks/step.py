"""Time whole steps at every level, precision, batch and model: `python -m benchmarks.step --out FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import measure, ops, step_cases
from benchmarks.case import Goal
from benchmarks.measure import Spread, Work, paired_ratio, quartiles
from benchmarks.step_cases import FLOOR_MS, PARTS, TRAFFIC, Peak, Rung, Runner, Shape
from semi_fast.engine import Engine
from semi_fast.errors import EXPECTED
from semi_fast.manifest import Manifest

MODELS = {"wrn_28_2": (32,), "resnet50_cifar": (32, 64)}
RATIOS = {256: 1, 448: 2}
"""Rows of a step of 64 labeled images: how many unlabeled ones there are to each of them."""
SAME = "same"
SPREADS = (
    "step_ms",
    "over_first_ratio",
    "over_eager_ratio",
    "same_over_same_ratio",
    *(f"{part}_ms" for part in PARTS),
    "views_share",
)
STEADY_STEPS = 3  # after the first one, before anything is timed
FASTEST = Rung("graph", "bf16", compiled=True)
GOALS = {
    ("wrn_28_2", 32, 256): (Goal("cuda", "step_ms", 2.6, False), Goal("cuda", "over_eager_ratio", 2, True)),
}
"""Of the fastest rung in bf16."""
Rows = list[dict[str, Any]]


class Plan(NamedTuple):
    """How a cell is measured."""

    device: torch.device
    repeats: int
    steps: int
    """Of one window."""
    cut: tuple[str, ...]
    """Names of the rungs whose steps are cut into parts."""
    counted: bool = True
    """Whether operations or launches are counted, too."""


class Opened(NamedTuple):
    """A rung that steps."""

    runner: Runner
    peak: tuple[float, float] | None


def measure_cell(shape: Shape, rungs: Sequence[Rung], manifest: Manifest, plan: Plan) -> Rows:
    """A row for each rung; those that cannot be carried out say why. Windows of all the others take turns."""
    device = plan.device
    step_cases.release(device)
    statuses = {rung: rung.obstacle(device) for rung in rungs}
    opened: dict[Rung, Opened] = {}
    cut: dict[Rung, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        for rung in rungs:
            if not statuses[rung]:
                try:
                    opened[rung] = open_one(rung, shape, manifest, device, stack)
                except EXPECTED as error:
                    statuses[rung] = f"failed: {ops_line(error)}"
                print(f"{shape} {rung.name}: {statuses[rung] or 'ready'}", file=sys.stderr)
        works = {rung.name: one.runner.window(plan.steps) for rung, one in opened.items()}
        seconds: dict[str, list[float]] = {}
        if works:
            works[SAME] = works[next(iter(works))]
            seconds = measure.time_interleaved(works, plan.repeats, device)
        for rung, one in opened.items():
            if rung.name in plan.cut:
                parts = step_cases.part_works(one.runner.engine, plan.steps)
                cut[rung] = measure.time_interleaved(parts, plan.repeats, device)
        rows = []
        for rung in rungs:
            row: dict[str, Any] = {"model": shape.model, "side": shape.side, "rows": shape.rows, "rung": rung.name}
            row |= {"level": rung.level, "compiled": rung.compiled, "precision": rung.precision}
            row |= {"channels_last": rung.channels_last, "status": statuses[rung] or "measured"}
            found = compare(rung, seconds, cut.get(rung, {})) if rung in opened else {}
            rows.append(row | cells(shape, rung, found, opened.get(rung), plan))
    return rows


def open_one(rung: Rung, shape: Shape, manifest: Manifest, device: torch.device, stack: ExitStack) -> Opened:
    """Build it, bring it to its level, and take the first steps."""
    peak = Peak(device)
    runner = Runner(step_cases.open_rung(rung, shape, manifest, device, stack))
    for _ in range(1 + STEADY_STEPS):
        runner.step()
    step_cases.wait(device)
    return Opened(runner, peak.read())


def ops_line(error: BaseException) -> str:
    """A failure as one line of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def compare(rung: Rung, seconds: dict[str, list[float]], cut: dict[str, list[float]]) -> dict[str, Spread]:
    """The spreads of a rung: its step, how much slower others are, and its parts."""
    mine, first = seconds[rung.name], next(iter(seconds))
    found = {
        "step_ms": quartiles([1000 * s for s in mine]),
        "over_first_ratio": paired_ratio(seconds[first], mine),
        "same_over_same_ratio": paired_ratio(seconds[SAME], seconds[first]),
    }
    eager = Rung("eager", rung.precision).name
    if eager in seconds:
        found["over_eager_ratio"] = paired_ratio(seconds[eager], mine)
    before = np.zeros(len(mine))
    for part, until in cut.items():
        found[f"{part}_ms"] = quartiles((1000 * (np.asarray(until) - before)).tolist())
        before = np.asarray(until)
    if cut:
        share = (np.asarray(cut["views"]) - cut["rows"]) / cut["count"]
        found["views_share"] = quartiles(share.tolist())
    return found


def cells(shape: Shape, rung: Rung, found: dict[str, Spread], opened: Opened | None, plan: Plan) -> dict[str, Any]:
    """The measured columns of a row; empty without a measurement."""
    row: dict[str, Any] = {}
    for name in SPREADS:
        for part in Spread._fields:
            column = name if part == "median" else f"{name}_{part}"
            row[column] = ops.digits(getattr(found[name], part)) if name in found else ""
    at = shape.model, shape.side, shape.rows
    traffic, floor = TRAFFIC.get(at, {}).get(rung.traffic), FLOOR_MS.get(at)
    seconds = found["step_ms"].median / 1000 if found else float("nan")
    engine = opened.runner.engine if opened else None
    flop = step_cases.forward_flop(engine) if engine else 0
    memory = opened.peak if opened else None
    hidden = rung.compiled and plan.device.type != "cuda"  # what counts operations is no part of compiled code
    counted = count(opened.runner, plan.device) if opened and plan.counted and not hidden else {}
    done, h200 = engine is not None, plan.device.type == "cuda" and "H200" in torch.cuda.get_device_name(plan.device)
    row |= {
        "images_per_second": ops.digits(engine.layout.images / seconds) if engine else "",
        "rows_per_second": ops.digits(shape.rows / seconds) if done else "",
        "forward_gflop_per_image": f"{flop / 1e9:.4f}" if done else "",
        "step_tflop": f"{3 * flop * shape.rows / 1e12:.4g}" if done else "",
        "tflop_per_second": ops.digits(3 * flop * shape.rows / seconds / 1e12) if done else "",
        "counted_traffic": rung.traffic if done and traffic else "",
        "gb_per_second": ops.digits(traffic / seconds) if done and traffic else "",
        "floor_percent": ops.digits(floor / seconds / 10) if done and floor and h200 else "",
        "dispatched": counted.get("dispatched", ""),
        "launches": counted.get("launches", ""),
        "waits": counted.get("waits", ""),
        "peak_mib": f"{memory[0]:.0f}" if memory else "",
        "reserved_mib": f"{memory[1]:.0f}" if memory else "",
        "ready_seconds": engine.level["seconds"] if engine else "",
    }
    goals = GOALS.get(at, ()) if rung == FASTEST and found else ()
    judged = [ops.judge([goal], found, plan.device) for goal in goals]
    row["goal"], row["verdict"] = (
        ("; ".join(filter(None, texts)) for texts in zip(*judged, strict=True)) if judged else ("", "")
    )
    return row | {"n": plan.repeats, "steps_per_window": plan.steps}


def count(runner: Runner, device: torch.device) -> dict[str, str]:
    """Operations or launches of a step, and waits where there is a device to wait for.

    To be called last: what has been profiled stays attached to the process, as graphs and its end do not get on.
    """
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    counted = measure.count(Work([runner.step]), device)
    if device.type != "cuda":
        assert counted.dispatched is not None
        return {"dispatched": f"{counted.dispatched:.0f}"}
    return {"launches": f"{counted.launches:.0f}", "waits": f"{counted.waits:.0f}"}


def evaluation_seconds(engine: Engine, repeats: int) -> list[float]:
    """Wall time of whole evaluations of the test set, from an idle device to the numbers on the host."""
    work = Work([engine.evaluations[0].confusions])
    return measure.time_interleaved({"evaluation": work}, repeats, engine.device)["evaluation"]


def screen(rows: Rows) -> str:
    """The rows for a terminal: the steps, their parts, and what the goals say."""
    head = ["", "ms", "images/s", "TFLOP/s", "% of floor", "launches", "waits", "peak MiB", "ready s"]
    names = ("images_per_second", "tflop_per_second", "floor_percent", "launches", "waits", "peak_mib", "ready_seconds")
    table, lines = [[*head, "x first", "x eager"]], []
    parts = [["part, ms", *PARTS]]
    for row in rows:
        name = f"{row['model']} {row['side']} px {row['rows']} rows {row['rung']}"
        if row["status"] != "measured":
            lines.append(f"{name}: left out, {row['status']}")
            continue
        values = [str(row[column]) for column in names]
        ratios = [ops.interval(row, "over_first_ratio"), ops.interval(row, "over_eager_ratio")]
        table.append([name, ops.interval(row, "step_ms"), *values, *ratios])
        if row["count_ms"]:
            parts.append([name, *(row[f"{part}_ms"] for part in PARTS)])
        if row["goal"]:
            lines.append(f"{name}: {row['goal']}: {row['verdict']}")
        if abs(float(row["same_over_same_ratio"]) - 1) > ops.UNSTEADY:
            lines.append(f"{name}: ratios are inconclusive, the same step over itself is {row['same_over_same_ratio']}")
    tables = [measure.aligned(table)] if len(table) > 1 else []
    tables += [measure.aligned(parts)] if len(parts) > 1 else []
    return "\n\n".join([*tables, *(["\n".join(lines)] if lines else [])])


def chosen(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """The names of a flag, in the order of `known`; ValueError for another."""
    names = text.split(",") if text else list(default)
    if set(names) - set(known):
        raise ValueError(f"must be some of {','.join(known)}; got {text}")
    return [name for name in known if name in names]


def cuts(rungs: Sequence[Rung], device: torch.device) -> tuple[str, ...]:
    """Which rungs are cut into parts if nobody says: of those that can be carried out the last, and the last eager."""
    able = [rung for rung in rungs if not rung.obstacle(device)]
    eager = [rung for rung in able if rung.level == "eager"]
    return tuple(dict.fromkeys(rung.name for rung in (*eager[-1:], *able[-1:])))


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--out", type=Path, help="the CSV to write")
    parser.add_argument("--data", type=Path, help="a prepared data set, for the models that take its size; else noise")
    parser.add_argument("--model", default="wrn_28_2", help="some of timm's or ours, with commas")
    parser.add_argument("--side", type=int, help="of the images, in pixels; else 32, and for resnet50_cifar 64 too")
    parser.add_argument("--rows", default="256", help="of a step: 256,448 (64 + 3 x 64 and 64 + 3 x 128 images)")
    parser.add_argument(
        "--labeled", type=int, default=64, help="labeled images instead of 64, the ratio as with --rows"
    )
    parser.add_argument("--precision", default="bf16", help="beside fp32: bf16,fp16")
    parser.add_argument("--rungs", help="names, with commas; else all, without torch.compile on a CPU")
    parser.add_argument("--cut", help="rungs whose steps are cut into parts; else the last eager one and the last")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--steps", type=int, help="of a window; 20 on a GPU, 1 on a CPU")
    parser.add_argument("--small", action="store_true", help="few synthetic images, for trying it out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    if min(arguments.repeats, arguments.labeled, arguments.steps or 1) < 1:
        parser.error("--repeats, --labeled and --steps must be at least 1")
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda:0" if cuda else "cpu")
    torch.set_num_threads(1)
    try:
        precisions = chosen(arguments.precision, ("bf16", "fp16", "fp32"), ())
        rungs = {rung.name: rung for rung in step_cases.ladder(precisions)}
        quick = [name for name, rung in rungs.items() if cuda or rung.level != "compile"]
        names = chosen(arguments.rungs, list(rungs), quick)
        plan = Plan(
            device,
            arguments.repeats,
            arguments.steps or (20 if cuda else 1),
            tuple(chosen(arguments.cut, names, cuts([rungs[name] for name in names], device))),
        )
        ratios = [RATIOS[int(rows)] for rows in chosen(arguments.rows, list(map(str, RATIOS)), ())]
    except ValueError as error:
        parser.error(str(error))

    if not arguments.rungs and len(quick) < len(rungs):
        left_out = ", ".join(name for name in rungs if name not in quick)
        print(f"left out: {left_out}, which starts slowly on a CPU; name it with --rungs", file=sys.stderr)
    origin = measure.provenance(device, measure.command("benchmarks.step", words, ("--out", "--data")))
    rows: Rows = []
    for model in arguments.model.split(","):
        for side in [arguments.side] if arguments.side else MODELS.get(model, (32,)):
            for ratio in ratios:
                shape = Shape(model, side, arguments.labeled, ratio)
                with step_cases.data_of(shape, arguments.data, small=arguments.small) as manifest:
                    data = f"{manifest.dataset}, sha256 {manifest.data_sha256[:12]}"
                    found = measure_cell(shape, [rungs[name] for name in names], manifest, plan)
                rows += [row | {"data": data} | origin for row in found]
    print(screen(rows))
    setting = (
        f"torch {origin['torch']}, {origin['clock']}, n={plan.repeats} windows of {plan.steps}; {origin['spread']}"
    )
    print(f"{origin['hardware']}, {origin['threads']} thread, {setting}")
    if arguments.out:
        measure.write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
