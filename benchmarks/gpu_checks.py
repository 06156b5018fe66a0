"""What must hold of whole steps on a GPU: capture changes nothing, nothing waits, resuming is exact, bf16 learns.

Every check is a generator of rows, so that what was found before a failure is kept.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import step_cases
from benchmarks.gpu_rows import INCONCLUSIVE, NO_TIME, OK, Row, Setting, checked, failed, measured, not_run
from benchmarks.ops import digits
from benchmarks.step_cases import Runner, Shape, open_engine
from semi_fast import train
from semi_fast.capture import rehearse
from semi_fast.data_prep.prepare import prepare_digits
from semi_fast.engine import Engine
from semi_fast.evaluation import Evaluation
from semi_fast.levels import Level
from semi_fast.manifest import Manifest, load_manifest
from semi_fast.pipelines import source
from semi_fast.schema.config import Config
from semi_fast.scores import scores
from semi_fast.sealed_json import read_json

SIDE = 16
STEPS = 20
RESUMED = 6, 12
SEEDS = 0, 1, 2
LEVELS = {
    "eager": Level(captured=False, compiled=False),
    "compile": Level(captured=False, compiled=True),
    "graph": Level(captured=True, compiled=False),
    "graph-compile": Level(captured=True, compiled=True),
}
QUICK = """
--split.labeled_max=30 --split.unlabeled_max=60 --split.imbalance_labeled=5 --split.imbalance_unlabeled=5
--augment.flip=false --augment.cutout=8 --model.bn_momentum=0.1 --method.epoch_steps=20
--method.semi.warmup_epochs=0 --method.semi.bank_slots=32 --method.semi.bank_decay_every=3
--method.semi.threshold=0.3 --ema.decay=0.98 --ema.ramp=true --checkpoint.every=0 --log.every=5
""".split()  # noqa: SIM905, a command line reads best as one
"""On digits; every part of the method takes part from the first steps on."""
BUDGET = 300  # steps of a run of the comparison
SAME_CODE = f"--optim.steps={BUDGET}", f"--eval.every={BUDGET}"
"""The schedules are constants of what is compiled: the comparison finds it in the compiler's cache."""
SECONDS_OF_RUN = 15
"""A run of the comparison is not begun with less left."""


@contextmanager
def small_data(setting: Setting) -> Iterator[Manifest]:
    """The digits, or where scikit-learn is missing synthetic images, in a folder of now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        try:
            yield prepare_digits(path, SIDE)
        except (ImportError, PackageNotFoundError):
            yield step_cases.synthetic(path, SIDE, classes=10, largest=100, tests=450)


def quick(manifest: Manifest, setting: Setting, *flags: str, model: str, labeled: int) -> Config:
    shape = Shape(model, SIDE, labeled, 1)
    return step_cases.configured(shape, manifest, setting.device, [*QUICK, *flags])


def differences(mine: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]) -> tuple[list[str], float]:
    """(names of what is not equal bit for bit, the largest difference); a missing tensor and NaN are no numbers."""
    ours, expected = dict(mine), dict(theirs)
    names, largest = sorted(ours.keys() ^ expected.keys()), 0.0
    for name in ours.keys() & expected.keys():
        a, b = ours[name].detach(), expected[name].detach()
        if a.shape != b.shape or a.dtype != b.dtype:
            names.append(name)
        elif not torch.equal(a, b):
            names.append(name)
            largest = max(largest, float((a.double() - b.double()).abs().nan_to_num(nan=1e30).max()))
    return sorted(names), largest


def equal(quantity: str, mine: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]) -> Row:
    names, largest = differences(mine, theirs)
    shown = f"{len(names)} differ, by at most {largest:.3g}: {', '.join(names[:4])}" if names else ""
    return checked(quantity, len(names), "tensors differ", "none, bit for bit", not names, note=shown)


def capture(setting: Setting) -> Iterator[Row]:
    """A captured step is the eager one, bit for bit, and its rehearsal has left nothing behind."""
    model, labeled = ("wrn_10_1", 8) if setting.small else ("wrn_28_2", 64)
    flags = "--precision=fp32", "--engine.deterministic=true"
    with small_data(setting) as manifest, ExitStack() as stack:
        config = quick(manifest, setting, *flags, model=model, labeled=labeled)
        eager = open_engine(config, manifest, stack, LEVELS["eager"])
        other = open_engine(config, manifest, stack, LEVELS["graph" if setting.cuda else "eager"])
        yield leaves_no_trace(other)
        yield from same_steps(eager, other, STEPS)
        yield from other_captures(manifest, setting, model=model, labeled=labeled)
    if not setting.cuda:
        yield not_run("captured equals eager", "a cpu has no CUDA graphs: eager equals eager")


def other_captures(manifest: Manifest, setting: Setting, *, model: str, labeled: int) -> Iterator[Row]:
    """The same with the rows read ahead by a thread, which goes on while the step is captured; and in fp16, scaled."""
    kinds = {"read ahead": ("fp32", 0.0), "fp16": ("fp16", source.FITS)}
    for kind, (precision, fits) in kinds.items():
        if precision == "fp16" and not setting.cuda:
            yield not_run(f"{kind}: captured equals eager", "a cpu has no fp16 training")
            continue
        flags = f"--precision={precision}", "--engine.deterministic=true"
        config = quick(manifest, setting, *flags, model=model, labeled=labeled)
        with ExitStack() as stack, patch.object(source, "FITS", fits):
            eager = open_engine(config, manifest, stack, LEVELS["eager"])
            other = open_engine(config, manifest, stack, LEVELS["graph" if setting.cuda else "eager"])
            for row in same_steps(eager, other, STEPS):
                yield row._replace(quantity=f"{kind}: {row.quantity}")
        step_cases.release(setting.device)


def leaves_no_trace(engine: Engine) -> Row:
    """Bringing an engine to its level trains nothing; what was made meanwhile holds zeros."""
    engine.draws.renew(0)
    engine.source.fetch(0, engine.images)
    before = {name: tensor.clone() for name, tensor in engine.changed()}
    engine.settle()
    if engine.device.type != "cuda":  # where an eager step is not tried out
        rehearse(engine.work, engine.changed, engine.device)
    after = dict(engine.changed())
    for name, tensor in after.items():
        if name not in before or before[name].shape != tensor.shape:
            before[name] = torch.zeros_like(tensor)
    return equal("rehearsal and capture leave no trace", after.items(), before.items())


def same_steps(eager: Engine, other: Engine, steps: int) -> Iterator[Row]:
    for engine in (eager, other):
        runner = Runner(engine)
        for _ in range(steps):
            runner.step()
        step_cases.wait(engine.device)
    name = f"{other.level['level']} equals eager after {steps} steps, fp32 deterministic"
    yield equal(name, other.changed(), eager.changed())
    done = int(eager.program.state.step)
    yield checked("steps counted on the device", done, "steps", str(steps), done == steps)
    pairs = (counted(engine.evaluations[0]) for engine in (other, eager))
    yield equal("evaluation equals eager", *pairs)


def counted(evaluation: Evaluation) -> list[tuple[str, Tensor]]:
    return [(name, torch.from_numpy(table)) for name, table in evaluation.confusions().items()]


def sync(setting: Setting) -> Iterator[Row]:
    """Settled steps and evaluations never wait for the device, at any level."""
    model, labeled = ("wrn_10_1", 8) if setting.small else ("wrn_10_2", 64)
    with small_data(setting) as manifest:
        for name, level in LEVELS.items():
            if not setting.cuda and level != LEVELS["eager"]:
                yield not_run(f"{name} never waits", "needs CUDA")
                continue
            precision = "fp32" if setting.small else "bf16"
            config = quick(manifest, setting, *SAME_CODE, f"--precision={precision}", model=model, labeled=labeled)
            try:
                with ExitStack() as stack:
                    yield from never_waits(name, open_engine(config, manifest, stack, level), STEPS)
            except Exception as error:  # noqa: BLE001, the other levels are still to be looked at
                yield failed(f"{name} never waits", error)
            step_cases.release(setting.device)


def never_waits(name: str, engine: Engine, steps: int) -> Iterator[Row]:
    runner, evaluation = Runner(engine), engine.evaluations[0]
    runner.step()
    evaluation.confusions()
    with waits_are_errors(engine.device):
        for _ in range(steps):
            runner.step()
        evaluation.at.fill_(evaluation.first)
        for _ in range(evaluation.batches):
            evaluation.run()
    step_cases.wait(engine.device)
    if engine.device.type != "cuda":
        yield not_run(f"{name} never waits", "a cpu has nothing to wait for")
        return
    yield Row(f"{name} never waits", "0", "0", "0", "waits", "0", OK, steps, "and no batch of an evaluation does")


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """On a GPU torch raises RuntimeError where the host would wait for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def resume(setting: Setting) -> Iterator[Row]:
    """A deterministic run that was interrupted ends as the one that ran through, at the level that users get."""
    half, steps = RESUMED
    with small_data(setting) as manifest, tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        flags = ["--engine.deterministic=true", f"--optim.steps={steps}", f"--eval.every={half}"]
        flags += [f"--checkpoint.every={half}", "--precision=bf16"]
        model, labeled = ("wrn_10_1", 8) if setting.small else ("wrn_10_2", 64)
        config = replace(quick(manifest, setting, *flags, model=model, labeled=labeled), run_dir=str(whole))
        train.run(config)
        level = read_json(whole / "env.json")["engine"]["level"]
        shutil.copytree(whole, broken)
        shutil.rmtree(broken / "checkpoints" / last(steps))
        step_cases.release(setting.device)
        train.run(replace(config, run_dir=str(broken), resume="auto"))
        states = [load_file(run / "checkpoints" / last(steps) / "state.safetensors") for run in (broken, whole)]
        name = f"{half} + {steps - half} steps equal {steps}, bf16 deterministic ({level})"
        yield equal(name, *(state.items() for state in states))
    step_cases.release(setting.device)


def last(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step_{step:09d}"


def parity(setting: Setting) -> Iterator[Row]:
    """At a fixed budget a bf16 graph is as accurate as fp32 eager, within the spread over seeds."""
    steps = setting.pick(BUDGET, 4)
    found: dict[str, list[float]] = {"fp32 eager": [], "bf16": []}
    fast = LEVELS["graph-compile" if setting.cuda else "eager"]
    settings = {"fp32 eager": ("fp32", LEVELS["eager"]), "bf16": ("bf16", fast)}
    with ExitStack() as data:
        manifest = load_manifest(setting.data) if setting.data else data.enter_context(small_data(setting))
        for seed in SEEDS:
            if setting.left < 2 * SECONDS_OF_RUN and not setting.small:
                break
            for name, (precision, level) in settings.items():
                flags = [
                    f"--seed={seed}",
                    f"--precision={precision}",
                    f"--optim.steps={steps}",
                    f"--eval.every={steps}",
                ]
                config = parity_config(manifest, setting, flags)
                with ExitStack() as stack:
                    engine = open_engine(config, manifest, stack, level)
                    found[name].append(accuracy(engine, steps))
                    del engine
                step_cases.release(setting.device)
    yield from judged_parity(found, steps, manifest.dataset, setting)


def parity_config(manifest: Manifest, setting: Setting, flags: list[str]) -> Config:
    if setting.data is None:
        model, labeled = ("wrn_10_1", 8) if setting.small else ("wrn_10_2", 64)
        return quick(manifest, setting, *flags, model=model, labeled=labeled)
    side = manifest.resolution[0]
    short = ["--method.epoch_steps=50", "--method.semi.warmup_epochs=1", "--ema.decay=0.98", "--ema.ramp=true"]
    short += ["--model.bn_momentum=0.05"]
    return step_cases.configured(Shape("wrn_28_2", side, 64, 1), manifest, setting.device, [*short, *flags])


def accuracy(engine: Engine, steps: int) -> float:
    """Balanced accuracy of the averaged weights in percent after so many steps; raises where one was not finite."""
    runner = Runner(engine)
    for _ in range(steps):
        runner.step()
    engine.check_finite()
    table = engine.evaluations[0].confusions()[engine.program.method.predicts]
    return scores(table, engine.labeled_counts)["balanced_accuracy"]


def judged_parity(found: dict[str, list[float]], steps: int, dataset: str, setting: Setting) -> Iterator[Row]:
    """The means over seeds may differ by no more than either kind's seeds do among themselves."""
    note = f"{dataset}, {steps} steps, averaged weights, low and high are those of the seeds"
    for name, values in found.items():
        if not values:
            yield not_run(f"balanced accuracy, {name}", NO_TIME)
            return
        low, high, n = min(values), max(values), len(values)
        row = measured(f"balanced accuracy, {name}", mean(values), "percent", setting, n=n, note=note)
        yield row._replace(low=digits(low), high=digits(high))
    plain, fast = found["fp32 eager"], found["bf16"]
    apart, spread = abs(mean(fast) - mean(plain)), max(max(v) - min(v) for v in (plain, fast))
    enough = len(plain) == len(SEEDS) and not setting.small
    verdict = INCONCLUSIVE if not enough else "met" if apart <= spread else "missed"
    text = digits(apart)
    goal = f"<= {digits(spread)}, the spread of {len(SEEDS)} seeds"
    yield Row("bf16 and fp32 eager apart", text, text, text, "points", goal, verdict, len(plain), note)
