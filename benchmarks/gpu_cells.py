"""The speed of whole steps on a GPU, against the reference loop, against plainer steps and against the goals."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, Protocol

import torch

from benchmarks import measure, step, step_cases
from benchmarks.gpu_rows import NO_TIME, Bound, Row, Setting, failed, measured, not_run
from benchmarks.measure import Spread, paired_ratio
from benchmarks.step_cases import Peak, Rung, Runner, Shape, open_rung, window
from semi_fast.manifest import Manifest

PAPER_STEPS, PAPER_EVALUATIONS = 250_000, 500
REFERENCE_WORKERS = 4  # of each of its loaders, as the released code has
FEW_CORES = 4
SELECTING = "--method.semi.threshold=0.15"
"""With 10 classes nearly every pseudo-label counts, as late in a run: the bank fills and goes on changing."""
FIRST = 10  # steps, in which the bank fills
ONE_COMPILE = 60  # seconds that may pass until a step of a network of 28 layers is compiled for the first time
EAGER, FAST = Rung("eager", "bf16"), Rung("graph", "bf16", compiled=True)
CAPTURED = Rung("graph", "bf16")
FOUND_OF_CELL = {
    "step_ms": "ms",
    "over_first_ratio": "times the first rung",
    "views_share": "of the step",
    **{f"{part}_ms": "ms" for part in step_cases.PARTS},
}


def wrn(setting: Setting, ratio: int = 1) -> Shape:
    return Shape("wrn_10_1", 16, 8, ratio) if setting.small else Shape("wrn_28_2", 32, 64, ratio)


def usable(rung: Rung, setting: Setting) -> Rung:
    """The rung, or where there are no graphs the eager one."""
    return rung if setting.cuda else Rung("eager", "fp32")


def ladder(setting: Setting) -> Iterator[Row]:
    """256 rows: what needs no compiler, then what does beside the plain step; if there is time two rungs of 448."""
    rungs = step_cases.ladder(["bf16"])
    plain, compiled = ([rung for rung in rungs if rung.compiled == which] for which in (False, True))
    yield from ladder_cell(wrn(setting), plain, setting)
    yield from ladder_cell(wrn(setting), compiled, setting, beside=[rungs[0], EAGER], counted=True)
    if setting.left < ONE_COMPILE and not setting.small:
        yield not_run(str(wrn(setting, 2)), NO_TIME)
        return
    yield from ladder_cell(wrn(setting, 2), [EAGER, FAST], setting)


def ladder_cell(
    shape: Shape, rungs: Sequence[Rung], setting: Setting, *, beside: Sequence[Rung] = (), counted: bool = False
) -> Iterator[Row]:
    """The rows of `rungs`; those of `beside` are timed for the ratios alone.

    Counting launches can slow down what the process does later.
    """
    able = [rung for rung in (*beside, *rungs) if setting.cuda or rung.level != "compile"]
    shown = {rung.name for rung in rungs}
    cut = tuple(name for name in step.cuts(able, setting.device) if name in shown)
    plan = step.Plan(setting.device, setting.pick(11, 2), setting.pick(20, 1), cut, counted)
    with step_cases.data_of(shape, None, small=setting.small) as manifest:
        rows = step.measure_cell(shape, able, manifest, plan)
    for row in rows:
        name = f"{shape} {row['rung']}"
        if row["rung"] in shown:
            yield from cell_rows(row, name, setting)
        elif row["launches"]:
            yield measured(f"{name}, launches", float(row["launches"]), "kernels", setting)


def cell_rows(row: Mapping[str, Any], name: str, setting: Setting) -> Iterator[Row]:
    """The columns of `benchmarks.step` as rows."""
    if row["status"] != "measured":
        yield not_run(name, row["status"]) if "failed" not in row["status"] else failed(name, row["status"])
        return
    fastest = row["rung"] == step.FASTEST.name
    paper = fastest and row["rows"] == 256 and row["model"] == "wrn_28_2"
    bounds = {"step_ms": Bound(2.6), "views_share": Bound(0.05)} if paper else {}
    steady, n = float(row["same_over_same_ratio"]), row["n"]
    for column, unit in FOUND_OF_CELL.items():
        if row[column]:
            yield measured(f"{name}, {column}", spread_of(row, column), unit, setting, bound=bounds.get(column), n=n)
    if row["over_eager_ratio"]:
        bound = Bound(2, at_least=True) if paper else None
        found = spread_of(row, "over_eager_ratio")
        yield measured(f"{name}, over eager", found, "times", setting, bound=bound, steady=steady, n=n)
    for column, unit, bound in (
        ("tflop_per_second", "TFLOP/s", None),
        ("gb_per_second", "GB/s", None),
        ("floor_percent", "percent of the practical floor", None),
        ("launches", "kernels", Bound(300) if paper else None),
        ("waits", "waits", Bound(0) if fastest else None),
        ("peak_mib", "MiB", None),
        ("reserved_mib", "MiB", None),
        ("ready_seconds", "s", None),
    ):
        if row[column] != "":
            yield measured(f"{name}, {column}", float(row[column]), unit, setting, bound=bound)


def spread_of(row: Mapping[str, Any], column: str) -> Spread:
    return Spread(*(float(row[name]) for name in (column, f"{column}_low", f"{column}_high")))


class Loop(Protocol):
    """The reference loop, which is imported where it is needed."""

    def step(self) -> None: ...

    def evaluate(self) -> dict[str, float]: ...

    def close(self) -> None: ...


@contextmanager
def reference_loop(shape: Shape, manifest: Manifest, setting: Setting, flags: Sequence[str]) -> Iterator[Loop]:
    from benchmarks.reference.loop import ReferenceLoop

    plain = Rung("eager", "fp32", channels_last=False)
    config = step_cases.configured(shape, manifest, setting.device, [*plain.flags(), *flags])
    split = step_cases.split_of(config, manifest)
    workers = setting.pick(REFERENCE_WORKERS, 0)
    loop = ReferenceLoop(config, manifest, split, setting.device, workers=workers)
    try:
        yield loop
    finally:
        loop.close()


@contextmanager
def cores(count: int) -> Iterator[int]:
    """This thread, and what it starts, on so many cores; gives their number, fewer if there are no more."""
    before = os.sched_getaffinity(0)
    some = set(sorted(before)[:count])
    os.sched_setaffinity(0, some)
    try:
        yield len(some)
    finally:
        os.sched_setaffinity(0, before)


def timed_steps(call: Callable[[], object], steps: int, setting: Setting) -> list[float]:
    """Wall seconds of each of the next steps, the device idle before and after."""
    work = window(call, 1, setting.device)
    clock = measure.gpu_seconds if setting.cuda else measure.cpu_seconds
    laps = [clock(work.phases[0]) for _ in range(steps)]
    step_cases.wait(setting.device)
    return [lap() for lap in laps]


def search_kernels(setting: Setting) -> None:
    """Let cuDNN and the matrix products choose as in our runs, for the reference loop too."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = setting.cuda, False
    torch.set_float32_matmul_precision("high")


def reference(setting: Setting) -> Iterator[Row]:
    """The reference loop and our fastest step, in turns; evaluations, memory, and what a whole run takes."""
    shape, repeats = wrn(setting), setting.pick(9, 2)
    search_kernels(setting)
    with step_cases.data_of(shape, None, small=setting.small) as manifest, ExitStack() as stack:
        theirs = Peak(setting.device)
        loop = stack.enter_context(reference_loop(shape, manifest, setting, [SELECTING]))
        loop.step()
        theirs.forget()  # what cuDNN's search took
        filling = timed_steps(loop.step, setting.pick(FIRST, 1), setting)
        yield measured("reference loop, bank filling", [1000 * s for s in filling], "ms", setting)
        others, peak = theirs.read(), Peak(setting.device)
        runner = Runner(open_rung(usable(FAST, setting), shape, manifest, setting.device, stack))
        for _ in range(FIRST):
            runner.step()
        step_cases.wait(setting.device)
        mine = peak.read()
        yield from memory_rows(mine, others, setting)
        steps = setting.pick(50, 1)
        works = {
            "ours": runner.window(steps),
            "reference": window(loop.step, setting.pick(5, 1), setting.device),
            "same": runner.window(steps),
        }
        seconds = measure.time_interleaved(works, repeats, setting.device)
        steady = paired_ratio(seconds["same"], seconds["ours"]).median
        for name in ("reference", "ours"):
            yield measured(f"{name}, step in turns", [1000 * s for s in seconds[name]], "ms", setting)
        ratio, bound = paired_ratio(seconds["reference"], seconds["ours"]), Bound(7, at_least=True)
        note = f"95 % interval; {len(os.sched_getaffinity(0))} cores, {REFERENCE_WORKERS} workers for each loader"
        yield measured("reference over ours", ratio, "times", setting, bound=bound, steady=steady, n=repeats, note=note)
        yield from evaluation_rows(runner, loop, median(seconds["ours"]), setting)
    yield from few_cores(shape, seconds["ours"], setting)


def memory_rows(
    mine: tuple[float, float] | None, theirs: tuple[float, float] | None, setting: Setting
) -> Iterator[Row]:
    if mine is None or theirs is None:
        yield not_run("peak memory", "not counted on a cpu")
        return
    yield measured("ours, peak memory", mine[0], "MiB", setting, note="from building on, compilers and pixels too")
    yield measured("reference, peak memory", theirs[0], "MiB", setting, note="of its later steps")
    yield measured("ours, reserved memory", mine[1], "MiB", setting)
    yield measured("peak memory of the reference's", mine[0] / theirs[0], "of it", setting, bound=Bound(0.6))


def evaluation_rows(ours: Runner, loop: Loop, step_seconds: float, setting: Setting) -> Iterator[Row]:
    """Evaluations at the paper's cadence, and a paper's run out of its parts."""
    engine, repeats = ours.engine, setting.pick(5, 1)
    seconds = step.evaluation_seconds(engine, repeats)
    images = len(engine.evaluations[0].set.labels)
    yield measured("ours, evaluation", [1000 * s for s in seconds], "ms", setting, note=f"{images} images")
    every = PAPER_STEPS / PAPER_EVALUATIONS
    shares = [s / (s + every * step_seconds) for s in seconds]
    yield measured("evaluations of a run", shares, "of its time", setting, bound=Bound(0.02))
    ready = engine.level["seconds"]
    minutes = [(PAPER_STEPS * step_seconds + PAPER_EVALUATIONS * s + ready) / 60 for s in seconds]
    note = f"{PAPER_STEPS} steps, {PAPER_EVALUATIONS} evaluations and {ready:.0f} s to be ready; extrapolated"
    yield measured("a paper's run", minutes, "minutes", setting, bound=Bound(12), note=note)
    if setting.left > 20 or setting.small:
        theirs = timed_steps(loop.evaluate, 1, setting)
        yield measured("reference, evaluation", [1000 * s for s in theirs], "ms", setting, note=f"{images} images")


def few_cores(shape: Shape, ours: Sequence[float], setting: Setting) -> Iterator[Row]:
    """The reference loop once more, on four cores; ours is that of before, which the host does not slow down."""
    if setting.left < 15 and not setting.small:
        yield not_run(f"reference on {FEW_CORES} cores", NO_TIME)
        return
    with (
        cores(FEW_CORES) as found,
        step_cases.data_of(shape, None, small=setting.small) as manifest,
        reference_loop(shape, manifest, setting, [SELECTING]) as loop,
    ):
        timed_steps(loop.step, setting.pick(FIRST, 1), setting)
        theirs = timed_steps(loop.step, setting.pick(30, 2), setting)
    ratios = [s / median(ours) for s in theirs]
    bound = Bound(10, at_least=True) if found == FEW_CORES else None
    note = "ours was timed just before, on all cores"
    yield measured(f"reference on {found} cores over ours", ratios, "times", setting, bound=bound, note=note)


def resnet(setting: Setting) -> Iterator[Row]:
    """ResNet-50 at two sizes: first the step as it is captured without a compiler, then compiled if there is time."""
    for side, bound in ((32, 4), (64, 3))[: setting.pick(2, 1)]:
        shape = wrn(setting) if setting.small else Shape("resnet50_cifar", side, 64, 1)
        for rung in dict.fromkeys(usable(rung, setting) for rung in (CAPTURED, FAST)):
            name = f"{shape} {rung.name}"
            if rung.compiled and setting.left < 2 * ONE_COMPILE:
                yield not_run(name, f"{NO_TIME} to compile it")
                continue
            try:
                yield from resnet_cell(shape, rung, name, Bound(bound, at_least=True), setting)
            except RuntimeError as error:
                yield failed(name, error)
            step_cases.release(setting.device)


def resnet_cell(shape: Shape, rung: Rung, name: str, bound: Bound, setting: Setting) -> Iterator[Row]:
    repeats = setting.pick(7, 2)
    search_kernels(setting)
    with step_cases.data_of(shape, None, small=setting.small) as manifest, ExitStack() as stack:
        loop = stack.enter_context(reference_loop(shape, manifest, setting, []))
        ours = Runner(open_rung(rung, shape, manifest, setting.device, stack))
        for runner in (ours.step, loop.step):
            timed_steps(runner, 3, setting)
        steps = setting.pick(5, 1)
        works = {
            "ours": ours.window(steps),
            "reference": window(loop.step, setting.pick(2, 1), setting.device),
            "same": ours.window(steps),
        }
        seconds = measure.time_interleaved(works, repeats, setting.device)
        flop = 3 * step_cases.forward_flop(ours.engine) * shape.rows
    steady = paired_ratio(seconds["same"], seconds["ours"]).median
    yield measured(f"{name}, step", [1000 * s for s in seconds["ours"]], "ms", setting)
    yield measured(f"{name}, rate", [flop / s / 1e12 for s in seconds["ours"]], "TFLOP/s", setting)
    yield measured(f"{shape} reference, step", [1000 * s for s in seconds["reference"]], "ms", setting)
    ratio = paired_ratio(seconds["reference"], seconds["ours"])
    yield measured(f"{name}, reference over ours", ratio, "times", setting, bound=bound, steady=steady, n=repeats)
    yield measured(f"{name}, ready", ours.engine.level["seconds"], "s", setting)
