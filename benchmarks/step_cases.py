"""What `benchmarks.step` times: data, programs at every rung of the ladder, and a step cut into growing parts."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Work
from semi_fast import train
from semi_fast.batch import Rows
from semi_fast.data_prep.long_tail import split_for
from semi_fast.data_prep.prepare import publish
from semi_fast.data_prep.readers import Raw
from semi_fast.loop.capture import rehearse
from semi_fast.loop.levels import Level, compile_obstacle
from semi_fast.loop.program import Program
from semi_fast.methods.base import Loss
from semi_fast.prepared.manifest import Manifest, Split, load_manifest, seal_split
from semi_fast.processes import gather_rows, sums
from semi_fast.schema.arguments import below, read_arguments
from semi_fast.schema.config import Config, check

BLOCK = 4096  # images made at once
TAIL, RATIO = 20, 100
"""Images of the smallest class, and how many times as many the largest may have at most."""
LABELED_SHARE = 0.1
LATE = "--method.semi.warmup_epochs=0", "--method.semi.threshold=0.15"
"""As late in a run: every term takes part, and with 10 classes nearly every pseudo-label is taken."""
MIB = 2**20
SYNTHETIC = {"wrn_28_2": (10, 4500, 10_000), "resnet50_cifar": (127, 100, 2_000)}
"""By model: classes, training images of the largest class, test images."""
TRAFFIC = {
    ("wrn_28_2", 32, 256): {"eager fp32": 10.7, "eager bf16": 5.34, "fused bf16": 3.93},
    ("wrn_28_2", 32, 448): {"eager fp32": 18.7, "eager bf16": 9.34, "fused bf16": 6.88},
    ("resnet50_cifar", 32, 256): {"eager fp32": 75.9, "eager bf16": 37.9, "fused bf16": 27.3},
    ("resnet50_cifar", 64, 256): {"eager fp32": 303.0, "eager bf16": 151.0, "fused bf16": 109.0},
    ("resnet50_cifar", 32, 448): {"fused bf16": 47.9},
    ("resnet50_cifar", 64, 448): {"fused bf16": 191.0},
}
"""By (model, side, rows): GB that forward and backward move, counted from the graph; half precision is that of bf16."""
FLOOR_MS = {
    ("wrn_28_2", 32, 256): 1.39,
    ("wrn_28_2", 32, 448): 2.43,
    ("resnet50_cifar", 32, 256): 4.8,
    ("resnet50_cifar", 64, 256): 19.1,
}
"""By (model, side, rows): what an H200 needs with ideal fusion and its convolutions of few channels; modelled."""


class Shape(NamedTuple):
    """The network and the images of a step."""

    model: str
    side: int
    labeled: int
    unlabeled_ratio: int

    @property
    def rows(self) -> int:
        """Of one forward; two strong views."""
        return self.labeled * (1 + 3 * self.unlabeled_ratio)

    def __str__(self) -> str:
        return f"{self.model} {self.side} px {self.rows} rows"


@dataclass(frozen=True)
class Rung:
    """One way to carry out the same step."""

    level: str
    precision: str
    channels_last: bool = True
    compiled: bool = False

    @property
    def name(self) -> str:
        fused = ["compile"] if self.level == "graph" and self.compiled else []
        return "-".join([self.level, *fused, self.precision, *([] if self.channels_last else ["contiguous"])])

    @property
    def traffic(self) -> str:
        """Which column of `TRAFFIC` it is compared with."""
        return "eager fp32" if self.precision == "fp32" else "fused bf16" if self.compiled else "eager bf16"

    def obstacle(self, device: torch.device) -> str:
        """Why it cannot be carried out; empty where it can."""
        if self.level == "graph" and device.type != "cuda":
            return f"a {device.type} has no CUDA graphs"
        return compile_obstacle(device, synchronised=False) if self.compiled else ""

    def flags(self) -> list[str]:
        options = {"engine.level": self.level, "precision": self.precision, "engine.channels_last": self.channels_last}
        return [f"--{key}={str(value).lower()}" for key, value in options.items()]


def ladder(precisions: Sequence[str]) -> list[Rung]:
    """From the fastest step to the plainest: one that is ended has shown what matters most."""
    best = [Rung("graph", precision, compiled=True) for precision in precisions]
    plain = [Rung("eager", precision) for precision in precisions]
    between = [rung for p in precisions for rung in (Rung("graph", p), Rung("compile", p, compiled=True))]
    return list(dict.fromkeys([*best, *plain, *between, Rung("eager", "fp32"), Rung("eager", "fp32", False)]))


def synthetic(out: Path, side: int, *, classes: int, largest: int, tests: int) -> Manifest:
    """Prepares noise over one colour pattern for each class; the training classes are long-tailed."""
    falling = largest * min(RATIO, max(1.0, largest / TAIL)) ** (-np.arange(classes) / (classes - 1))
    rng = np.random.default_rng(0)
    labels = {
        "train": rng.permutation(np.repeat(np.arange(classes), np.maximum(falling.astype(int), TAIL))),
        "test": np.arange(tests) % classes,
    }
    patterns = rng.integers(0, 128, (classes, side, side, 3), dtype=np.uint8)

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        for part, ids in labels.items():
            for some in np.array_split(ids, -(-len(ids) // BLOCK)):
                yield part, patterns[some] + rng.integers(0, 128, (len(some), side, side, 3), dtype=np.uint8)

    names = tuple(map(str, range(classes)))
    raw = Raw("synthetic", names, (side, side), labels, 0, blocks(), {"rule": "synthetic"})
    return publish(lambda: raw, out, f"synthetic --side {side} --classes {classes}")


@contextmanager
def data_of(shape: Shape, path: Path | None, *, small: bool = False) -> Iterator[Manifest]:
    """The prepared data set at `path`, which must have images of this side, or synthetic images in a folder of now."""
    if path is not None:
        manifest = load_manifest(path)
        if manifest.resolution != (shape.side, shape.side):
            raise ValueError(f"--data must have images of {shape.side} pixels; {path} has {manifest.resolution}")
        yield manifest
        return
    classes, largest, tests = SYNTHETIC.get(shape.model, SYNTHETIC["wrn_28_2"])
    if small:
        classes, largest, tests = 10, 100, 40
    with tempfile.TemporaryDirectory() as folder:
        yield synthetic(Path(folder) / "data", shape.side, classes=classes, largest=largest, tests=tests)


def configured(shape: Shape, manifest: Manifest, device: torch.device, flags: Sequence[str]) -> Config:
    """A run of `shape` as it is late, else with the defaults of the method; `flags` on top. Without keys of a split,
    every class has the same share of labeled images."""
    common = [
        *LATE,
        f"--data.path={manifest.root}",
        f"--model.name={shape.model}",
        f"--batch.labeled={shape.labeled}",
        f"--batch.unlabeled_ratio={shape.unlabeled_ratio}",
        f"--device={device.type}",
        f"--run_dir={manifest.root / 'run'}",
    ]
    if not any(flag.startswith("--split.") for flag in flags):
        common.append(f"--split.labeled_fraction={LABELED_SHARE}")
    config, _ = read_arguments(below(flags, common))  # what is late of SeMi has no effect on others
    check(config)
    return config


def split_of(config: Config, manifest: Manifest) -> Split:
    return seal_split(split_for(manifest, "run", config.split))


def open_program(config: Config, manifest: Manifest, stack: ExitStack, level: Level | None = None) -> Program:
    """The program of a run, without its files; `level` in place of those of the configuration. `stack` ends it."""
    accelerator = Accelerator(cpu=config.device == "cpu")
    split = split_of(config, manifest)
    assert config.run_dir is not None
    with redirect_stdout(sys.stderr):
        parts = config, manifest, split, accelerator
        run = train.build(*parts, run_dir=Path(config.run_dir), meta={}, stack=stack)
    run.journal.screen.quiet = True
    if level is not None:
        run.program.levels, run.program.why = [level], ""
    return run.program


def open_rung(rung: Rung, shape: Shape, manifest: Manifest, device: torch.device, stack: ExitStack) -> Program:
    """The program of a rung, which has no other to fall back to."""
    level = Level(captured=rung.level == "graph", compiled=rung.compiled)
    return open_program(configured(shape, manifest, device, rung.flags()), manifest, stack, level)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what programs that are gone held."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Peak:
    """Memory of the device that is taken from now on, beyond what was; in MiB."""

    def __init__(self, device: torch.device):
        self.device, self.start, self.start_reserved = device, 0, 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.start, self.start_reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def read(self) -> tuple[float, float] | None:
        """(allocated at most, reserved at most); None where it is not counted."""
        if self.device.type != "cuda":
            return None
        allocated, reserved = torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved
        return (allocated(self.device) - self.start) / MIB, (reserved(self.device) - self.start_reserved) / MIB


class Runner:
    """A program that goes on, step by step."""

    def __init__(self, program: Program):
        self.program, self.done = program, 0

    def step(self) -> None:
        self.program.one_step(self.done)
        self.done += 1

    def window(self, steps: int) -> Work:
        """So many steps; the device is waited for, so that the host runs ahead into no other window."""
        return window(self.step, steps, self.program.device)


def window(step: Callable[[], object], steps: int, device: torch.device) -> Work:
    def phase() -> None:
        for _ in range(steps):
            step()
        wait(device)

    return Work([phase], calls_per_phase=steps)


def forward_flop(program: Program) -> int:
    """Of one image through the network, counted by torch; a multiplication and an addition are two."""
    height, width = program.images.shape[1:3]
    image = torch.zeros(1, 3, height, width, device=program.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.train_step.state.average.model(image)
    return counter.get_total_flops()


def parts(program: Program) -> dict[str, Callable[[], Any]]:
    """A step's work up to the end of each part: every one does all that comes before it, too.

    With a compiled forward and loss `forward` alone is left out: nothing cuts the compiled code.
    """
    step, s = program.train_step, program.train_step.state

    def rows() -> Rows:
        ids, visits = program.draws.share(s.step)
        program.source.read(ids, program.images)
        return Rows(program.images, ids, visits, program.labels[ids[: program.layout.labeled]], program.layout)

    def views() -> tuple[Rows, Tensor]:
        read = rows()
        return read, step.make_views(read)

    def backward() -> tuple[Loss, list[Tensor]]:
        loss, found = step.losses(*views())
        s.optimizer.zero_grad(set_to_none=True)
        s.scaler.scale(loss.total).backward()
        return loss, found

    def update() -> Tensor:
        loss, found = backward()
        return step.bookkeeping(step.watched(loss.total, found), gather_rows(loss.pending) | sums(loss.totals))

    def optimizer() -> None:
        weight = update()
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.average.update(weight)

    found: dict[str, Callable[[], Any]] = {
        "rows": rows,
        "views": views,
        "forward": lambda: step.forward(s.model, views()[1]),
        "loss": lambda: step.losses(*views()),
        "backward": backward,
        "update": update,
        "optimizer": optimizer,
        "count": program.work,
    }
    if step.losses != step.forward_and_loss:
        del found["forward"]
    return found


PARTS = ("rows", "views", "forward", "loss", "backward", "update", "optimizer", "count")


def part_works(program: Program, steps: int) -> dict[str, Work]:
    """Windows of every part: captured on its own where the program's step is a graph.

    The graphs share their memory: none reads what another has left there.
    """
    works = {}
    graphs = program.prepared["level"] == "graph"
    pool = torch.cuda.graph_pool_handle() if graphs else None
    for name, part in parts(program).items():
        call: Callable[[], Any] = part
        if graphs:
            rehearse(dropped(part), program.changed, program.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                part()
            call = graph.replay
        works[name] = window(call, steps, program.device)
    return works


def dropped(call: Callable[[], Any]) -> Callable[[], None]:
    def only() -> None:
        call()

    return only
