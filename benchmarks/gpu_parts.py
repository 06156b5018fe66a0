"""The speed of a step's parts on a GPU, of several processes together, and of short whole runs."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import measure, step_cases
from benchmarks import ops as operations_benchmark
from benchmarks.case import Case
from benchmarks.gpu_cells import FAST, usable, wrn
from benchmarks.gpu_rows import Bound, Row, Setting, failed, measured, not_run
from benchmarks.measure import Spread, Work, paired_ratio
from benchmarks.packing import Told, join, members, together

STEPS, EVERY = 600, 100  # of a short whole run
ACCURACIES = "20,40,60"  # balanced, in percent

CASES = {"rand_augment": -1, "bank_push": 0, "pseudo_label": 0, "masked_cross_entropy": 0, "embedding_align": 0}
"""Of an operation's cases in `benchmarks.ops`, the one that is timed."""
COMPILED = "pseudo_label", "masked_cross_entropy", "embedding_align"
"""Whose references torch.compile can make one or two kernels of."""


def operations(setting: Setting) -> Iterator[Row]:
    """Every operation inside a graph: its kernel, its reference, and that of the losses compiled."""
    for name, at in CASES.items():
        try:
            case = operations_benchmark.CASES[name](setting.device)[at]
            yield from operation_rows(case, setting)
        except Exception as error:  # noqa: BLE001, the other operations are still to be timed
            yield failed(name, error)


def operation_rows(case: Case, setting: Setting) -> Iterator[Row]:
    kinds = operations_benchmark.find_operation(case, setting.device)
    works = {kind: case.work(operation) for kind, operation in kinds.items()}
    if setting.cuda and case.operation in COMPILED:
        reference = operations_benchmark.find_reference(case)
        works["compiled"] = case.work(torch.compile(reference, dynamic=False))
    able: dict[str, Work] = {}
    for kind, work in works.items():
        try:
            able[kind] = measure.captured(work) if setting.cuda else work
        except RuntimeError as error:
            yield not_run(f"{case.operation}, {kind}", f"not captured: {' '.join(str(error).split())[:150]}")
    ours = "kernel" if "kernel" in able else "reference"
    able["same"] = able[ours]
    seconds = measure.time_interleaved(able, setting.pick(15, 1), setting.device)
    steady = paired_ratio(seconds["same"], seconds[ours]).median
    for kind in able:
        if kind != "same":
            bound = Bound(20) if (case.operation, kind) == ("bank_push", ours) else None
            times = [1e6 * s for s in seconds[kind]]
            yield measured(
                f"{case.operation}, {kind}", times, "us", setting, bound=bound, steady=steady, note=case.shape
            )
    if case.strong_views:
        rates, bound = [case.strong_views / s for s in seconds[ours]], Bound(2e6, at_least=True)
        yield measured(f"{case.operation}, {ours}", rates, "strong views/s", setting, bound=bound, steady=steady)
    if "compiled" in seconds and ours in seconds:
        ratio = paired_ratio(seconds["compiled"], seconds[ours])
        yield measured(f"{case.operation}, compiled over {ours}", ratio, "times", setting, steady=steady)


def packed(setting: Setting) -> Iterator[Row]:
    """One, two and three processes on the device; the first one also shows how soon a second start steps."""
    rung, seconds = usable(FAST, setting), 0.5 if setting.small else 3.0
    told = Told(wrn(setting), rung, setting.device, setting.small)
    with members() as found:
        first = join(found, told).first_step()
        note = "new process, imports, data, compilers' caches of earlier sections on the disk"
        yield measured("start to first step, warm", first, "s", setting, bound=Bound(60), note=note)
        count = setting.pick(3, 2)
        for member in [join(found, told) for _ in range(count - 1)]:
            member.first_step()
        together(found, seconds / 4)
        alone = 0.0
        for n in range(1, count + 1):
            rate = sum(ran.steps / ran.seconds for ran in together(found[:n], seconds))
            alone = alone or rate
            yield measured(f"{n} processes together", rate, "steps/s", setting, note=f"{rate / alone:.2f} times one")
            if n == count:
                yield measured(f"{n} processes over one", rate / alone, "times", setting, bound=Bound(1.3, True))


def end_to_end(setting: Setting) -> Iterator[Row]:
    """Seconds and accuracy of a short budget, ours in bf16 and the reference loop, by `benchmarks.end_to_end`."""
    from benchmarks.end_to_end import main

    shape = wrn(setting)
    steps, every = setting.pick(STEPS, 4), setting.pick(EVERY, 2)
    with ExitStack() as stack:
        manifest = stack.enter_context(step_cases.data_of(shape, setting.data, small=setting.small))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        defaults, out = folder / "defaults.yaml", folder / "runs.csv"
        defaults.write_text(f"split:\n  labeled_fraction: {step_cases.LABELED_SHARE}\n")
        flags = [f"--model.name={shape.model}", f"--batch.labeled={shape.labeled}", f"--optim.steps={steps}"]
        flags += [f"--eval.every={every}", f"--method.epoch_steps={every // 2}", "--method.semi.warmup_epochs=1"]
        flags += ["--ema.decay=0.98", "--ema.ramp=true", "--model.bn_momentum=0.05"]
        flags += [f"--device={setting.device.type}", f"--precision={'bf16' if setting.cuda else 'fp32'}"]
        main([f"--data={manifest.root}", f"--out={out}", f"--config={defaults}", f"--thresholds={ACCURACIES}", *flags])
        with out.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["kind"] == "summary"]
        for row in rows:
            yield from run_rows(row, f"{row['trainer']}, {steps} steps on {manifest.dataset}", setting)


def run_rows(row: dict[str, str], name: str, setting: Setting) -> Iterator[Row]:
    """A trainer's summary; the goals are judged elsewhere, with more steps in a window."""
    units = {"balanced_accuracy": "percent", "wall_seconds": "s", "evaluation_seconds": "s", "start_seconds": "s"}
    units |= {column: "s" for column in row if column.startswith("seconds_to_")}
    for column, unit in units.items():
        if row[column]:
            yield measured(f"{name}, {column}", float(row[column]), unit, setting)
    for column, unit in {"seconds_per_step": "s", "chunk_ratio": "times", "paper_minutes": "minutes"}.items():
        if row[column]:
            ends = (float(row[key]) for key in (column, f"{column}_low", f"{column}_high"))
            yield measured(f"{name}, {column}", Spread(*ends), unit, setting, n=int(row["n"]))
