"""The two trainers that benchmarks of whole steps compare, behind the same calls: ours and the reference loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator

from benchmarks import measure, pipelines, step_cases
from benchmarks.reference.loop import ReferenceLoop, check_rendered
from semi_fast.data_prep.long_tail import split_for
from semi_fast.prepared.manifest import Manifest, Split, load_manifest, seal_split
from semi_fast.rundir.scores import scores
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.config import Config
from semi_fast.train import build

REFERENCE, OURS = "reference", "ours"
TRAINERS = REFERENCE, OURS
SMALL = "configs/cifar10_lt/cpu_semi.yaml"
FILE = f"--config={Path(__file__).resolve().parents[1] / SMALL}"
HELP = "every other flag is one of `semi-fast train`; with --data and without --config they are on top of " + SMALL


class Trainer(Protocol):
    """What is timed."""

    def step(self) -> None:
        """Train one step; on a GPU it may still run when this returns."""
        ...

    def evaluate(self) -> dict[str, float]:
        """top1 and balanced_accuracy of the averaged weights on the test set, in percent."""
        ...

    def close(self) -> None: ...


class OurLoop:
    """The loop of `semi-fast train`, one step at a time; nothing is written."""

    def __init__(self, config: Config, manifest: Manifest, split: Split, device: torch.device):
        self.stack = ExitStack()
        accelerator = Accelerator(cpu=device.type == "cpu")
        unused = Path("unused")
        self.run = build(config, manifest, split, accelerator, run_dir=unused, meta={}, stack=self.stack)
        self.done = 0

    def step(self) -> None:
        self.run.program.one_step(self.done)
        self.done += 1

    def evaluate(self) -> dict[str, float]:
        confusions = self.run.program.evaluations[0].confusions()
        found = scores(confusions[self.run.program.train_step.method.predicts], self.run.labeled_counts)
        return {name: found[name] for name in ("top1", "balanced_accuracy")}

    def close(self) -> None:
        self.stack.close()


class Setting(NamedTuple):
    """What both trainers are given."""

    config: Config
    manifest: Manifest
    split: Split
    device: torch.device
    workers: int
    """Processes for each of the reference's two loaders."""

    def open(self, name: str) -> Trainer:
        """On a GPU both search for kernels as ours does, from the first step on: what that takes is memory of both."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = not self.config.engine.deterministic
        if name == OURS:
            return OurLoop(self.config, self.manifest, self.split, self.device)
        return ReferenceLoop(self.config, self.manifest, self.split, self.device, workers=self.workers)

    @property
    def columns(self) -> dict[str, Any]:
        """What the rows of a benchmark say of it."""
        c = self.config
        return {
            "model": c.model.name,
            "rows_per_step": c.batch.labeled * (1 + 3 * c.batch.unlabeled_ratio),
            "images_per_step": c.batch.labeled * (1 + c.batch.unlabeled_ratio),
            "workers": self.workers,
            "data": f"{self.manifest.dataset}, sha256 {self.manifest.data_sha256[:12]}",
            "split_sha256": self.split.sha256[:12],
        }


@contextmanager
def data_or_noise(path: Path | None, *, small: bool) -> Iterator[tuple[Path, Sequence[str]]]:
    """(a prepared data set, flags for what no flag says): `path`, or noise in a folder of now."""
    if path is not None:
        yield path, [FILE]
        return
    with step_cases.data_of(step_cases.Shape("wrn_28_2", 32, 64, 1), None, small=small) as manifest:
        yield manifest.root, [f"--split.labeled_fraction={step_cases.LABELED_SHARE}", *step_cases.LATE]


def settings(data: Path, flags: Sequence[str], workers: int | None, defaults: Sequence[str] = (FILE,)) -> Setting:
    """What the flags of `semi-fast train` describe; `defaults`, and fp32, for what they do not say.

    Raises ValueError for what the reference loop does not do. Without `workers`, 0 on a CPU, so that the CPU time of
    one process is all there is, and 4 on a GPU, as the released code has.
    """
    given = {flag.partition("=")[0] for flag in flags}
    unsaid = {flag.partition("=")[0]: flag for flag in ("--precision=fp32", "--device=auto", *defaults)}
    unsaid = [flag for name, flag in unsaid.items() if name not in given]
    config = parse_config([*unsaid, *flags, f"--data.path={data}"])
    check_rendered(config)
    device = measure.find_device(config.device)
    manifest = load_manifest(data)
    split = seal_split(split_for(manifest, "run", config.split))
    workers = (4 if device.type == "cuda" else 0) if workers is None else workers
    return Setting(config, manifest, split, device, workers)


class Seconds(NamedTuple):
    """How long something took."""

    wall: float
    cpu: float
    """Of this process, its threads and its children."""

    def of(self, device: torch.device) -> float:
        """By the clock that decides on this device: wall on a GPU, CPU time on a CPU, which others use too."""
        return self.wall if device.type == "cuda" else self.cpu

    def __add__(self, other: Seconds) -> Seconds:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def timed(call: Callable[[], object], device: torch.device) -> Seconds:
    """Of the call, from an idle device to an idle device and from full queues to full queues: what loaders' processes
    make ahead is paid for where it is taken."""
    wait_for(device)
    wall, cpu = time.perf_counter(), pipelines.cpu_seconds()
    call()
    wait_for(device)
    end = time.perf_counter()
    return Seconds(max(end, pipelines.wait_until_quiet()) - wall, pipelines.cpu_seconds() - cpu)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was timed has ended


def run_steps(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step()


def repeated(module: str, words: Sequence[str]) -> str:
    """The command, with the name of the data set's folder alone."""
    named, before = [], ""
    for word in words:
        flag, equals, value = word.partition("=")
        if before == "--data":
            word = Path(word).name
        elif flag == "--data" and equals:
            word = f"{flag}={Path(value).name}"
        named.append(word)
        before = word
    return measure.command(module, named)
