"""How many operations a step dispatches, part by part; counted on any machine, with the kernels that a GPU runs.

    python -m benchmarks.operations --out benchmarks/results/operations.csv

Kernels count as the one operation that they are registered as, and run in Triton's interpreter. `outside_compiled` is
what level `compile` still dispatches, beside one call for forward and loss and one for their backward; a graph holds
what level `eager` or `compile` dispatches. A test keeps every count within the recorded one. Nearly every pseudo-label
of the reference loop is taken (threshold 0.15), as late in a run; ours costs the same whatever is taken.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import measure
from semi_fast.batch import RowLayout, Rows
from semi_fast.loop.ema import WeightAverage
from semi_fast.loop.metrics import Interval
from semi_fast.loop.sampling import Batches, DeviceBatches
from semi_fast.loop.step import NEVER, TrainState, TrainStep, make_optimizer
from semi_fast.methods import Environment, make_method
from semi_fast.models import make_classifier
from semi_fast.ops import door
from semi_fast.pipelines.augment import Augmenter
from semi_fast.schema.data import AugmentConfig
from semi_fast.schema.method import MethodConfig
from semi_fast.schema.model import EmaConfig, ModelConfig, OptimConfig
from semi_fast.schema.semi import PRESETS, SemiConfig
from semi_fast.screen import tolerate_closed_pipes

CPU = torch.device("cpu")
COUNTS = (9, 8, 7, 6, 5, 4, 3, 2, 1, 1)
METHODS = {
    "supervised+la": MethodConfig(name="supervised", plugins=("la",)),
    "fixmatch": MethodConfig(name="fixmatch"),
    "fixmatch+la": MethodConfig(name="fixmatch", plugins=("la",)),
    "semi": MethodConfig(name="semi"),
    "semi paper": MethodConfig(name="semi", semi=SemiConfig(**PRESETS["paper"], bank_sampling=3)),
}
BATCH, SIDE = 2, 32


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Kernels instead of references, and shapes that depend on no value."""
    modules = [m for name, m in sys.modules.items() if name.startswith("semi_fast.ops.") and hasattr(m, "has_kernel")]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "has_kernel", lambda device: True))
        stack.enter_context(patch.object(door, "values_at_hand", lambda device: False))
        yield


class Step:
    """The work of a program's step on nothing but tensors."""

    def __init__(self, options: MethodConfig, model_name: str):
        self.method = make_method(options, steps=20)
        needs = self.method.needs
        unlabeled = BATCH if needs.unlabeled else 0
        model = make_classifier(ModelConfig(name=model_name), 10, needs.heads, (SIDE, SIDE))
        state = TrainState(
            model=model,
            average=WeightAverage(model),
            optimizer=make_optimizer(model, OptimConfig(steps=20), CPU),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            method=self.method.init(Environment(COUNTS, model.features, CPU, torch.float32, COUNTS)),
            step=torch.zeros((), dtype=torch.int64),
            bad_step=torch.full((), NEVER, dtype=torch.int64),
        )
        views = Augmenter(
            AugmentConfig(),
            seed=0,
            resolution=(SIDE, SIDE),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            device=CPU,
            dtype=torch.float32,
        ).views
        optim, ema = OptimConfig(steps=20), EmaConfig()
        self.program = TrainStep(state, self.method, views, optim=optim, ema=ema, precision="fp32")
        self.layout = RowLayout(BATCH, unlabeled, needs.strong_views)
        batches = Batches(np.arange(30), np.arange(300), seed=0, labeled_rows=BATCH, unlabeled_rows=unlabeled)
        self.draws = DeviceBatches(batches, CPU)
        self.draws.renew(0)
        self.pool = torch.zeros(300, SIDE, SIDE, 3, dtype=torch.uint8)
        self.images = torch.empty(self.layout.images, SIDE, SIDE, 3, dtype=torch.uint8)
        self.labels = torch.zeros(300, dtype=torch.int64)
        self.interval = Interval(self.labels, 10)

    def rows(self) -> Rows:
        ids, visits = self.draws.share(self.program.state.step)
        torch.index_select(self.pool, 0, ids, out=self.images)
        return Rows(self.images, ids, visits, self.labels[ids[:BATCH]], self.layout)

    def run(self) -> None:
        rows = self.rows()
        self.interval.add(self.program(rows), rows.ids[BATCH:])


def counted(call: Callable[[], Any]) -> tuple[int, int]:
    """(operations that are no views, waits) of a call."""
    with measure.DispatchCounter() as seen:
        call()
    return seen.dispatched - seen.views, seen.waits


def parts(options: MethodConfig, model_name: str = "wrn_28_2") -> dict[str, int]:
    """Operations of a step by part, all of them, those that compiling leaves, and how often it waits."""
    with as_on_a_gpu():
        step = Step(options, model_name)
        step.run()  # which makes the constant tables
        rows: Rows = step.rows()
        sampling, _ = counted(step.rows)
        views, _ = counted(lambda: step.program.make_views(rows))
        made = step.program.make_views(rows)
        forward, _ = counted(lambda: step.program.forward_and_loss(rows, made))
        loss, _ = step.program.forward_and_loss(rows, made)
        step.program.state.optimizer.zero_grad(set_to_none=True)  # else gradients are added, which a step never does
        backward, _ = counted(loss.total.backward)
        whole, waits = counted(step.run)
    return {
        "sampling": sampling,
        "views": views,
        "forward_and_loss": forward,
        "backward": backward,
        "rest": whole - sampling - views - forward - backward,
        "eager": whole,
        "outside_compiled": whole - forward - backward,
        "waits": waits,
    }


def reference_parts() -> dict[str, int]:
    """Operations and waits of a step of the reference loop while its bank fills, the work of its loaders left out."""
    from benchmarks.reference.loop import ReferenceLoop
    from benchmarks.step_cases import Shape, configured, data_of, split_of

    shape = Shape("wrn_28_2", SIDE, 64, 1)
    with data_of(shape, None, small=True) as manifest:
        config = configured(shape, manifest, CPU, [])
        loop = ReferenceLoop(config, manifest, split_of(config, manifest), CPU, workers=0)
        loop.step()
        batch = loop.fetch()
        whole, waits = counted(lambda: loop.update(batch))
        loop.close()
    return {"eager": whole, "waits": waits}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    provenance = measure.provenance(CPU, measure.command("benchmarks.operations", sys.argv[1:]))
    origin = {key: provenance[key] for key in ("date", "commit", "torch", "triton", "command")}
    rows = []
    for name, options in METHODS.items():
        row = {"loop": name, "model": "wrn_28_2", **parts(options)}
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        rows.append(row | origin)
    row = {"loop": "semi, reference loop", "model": "wrn_28_2", **reference_parts()}
    print(row)
    rows.append({key: row.get(key, "") for key in rows[0]} | origin)
    measure.write_csv(out, rows)


if __name__ == "__main__":
    with tolerate_closed_pipes():
        main()
