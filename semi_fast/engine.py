"""The loop: step, log, evaluate, save; the only one, and the only place that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semi_fast import checkpoint, processes
from semi_fast.batch import RowLayout, Rows
from semi_fast.errors import NonFiniteError
from semi_fast.metrics import Interval, add_pairs
from semi_fast.runlog import Clock, MetricsFile, Screen
from semi_fast.sampling import Batches
from semi_fast.schema.config import Config
from semi_fast.scores import scores
from semi_fast.step import NEVER, TrainStep


@dataclass
class EvalSet:
    """Images that are evaluated, all of them, on the device."""

    name: str
    images: Tensor  # uint8 [n, H, W, 3]
    labels: Tensor  # int64 [n]


class Engine:
    """Drives a `TrainStep` over a configuration's steps."""

    def __init__(
        self,
        config: Config,
        program: TrainStep,
        read: Callable[[int, Tensor, Tensor], None],
        batches: Batches,
        *,
        layout: RowLayout,
        resolution: tuple[int, int],
        labels: Tensor,
        interval: Interval,
        eval_sets: Sequence[EvalSet],
        labeled_counts: Sequence[int],
        plain_view: Callable[[Tensor], Tensor],
        metrics: MetricsFile | None,
        screen: Screen,
        checkpoints: Path,
        meta: dict[str, Any],
        track: Callable[[dict[str, float], int], None],
    ):
        """`read` is a source's, of (step, ids, out); `labels` int64 [samples], -1 unless labeled; `metrics` None but on
        the main process."""
        self.config, self.program, self.read, self.batches = config, program, read, batches
        self.layout, self.labels, self.interval, self.eval_sets = layout, labels, interval, eval_sets
        self.labeled_counts, self.plain_view = labeled_counts, plain_view
        self.metrics, self.screen, self.checkpoints, self.meta, self.track = metrics, screen, checkpoints, meta, track
        self.device, self.clock = labels.device, Clock()
        self.latest: dict[str, str] = {}  # what the last evaluation of each set said
        self.images = torch.empty(layout.images, *resolution, 3, dtype=torch.uint8, device=self.device)

    def fit(self, start: int) -> None:
        """Train from step `start` to the end; raises NonFiniteError, after which nothing has been saved."""
        c, steps = self.config, self.config.optim.steps
        self.screen.begin(start)
        self.clock.lap()
        for step in range(start, steps):
            self.one_step(step)
            done = step + 1
            last = done == steps
            if last or done % c.eval.every == 0:
                self.check_finite()
                self.pause()
                for eval_set in self.eval_sets:
                    self.record_evaluation(eval_set, done, last=last)
                self.clock.lap()
            if last or done % c.log.every == 0:
                self.log(done)
            if last or (c.checkpoint.every and done % c.checkpoint.every == 0):
                self.pause()
                self.save(done)
                self.clock.lap()
        self.screen.close()

    def one_step(self, step: int) -> None:
        """Rows in, one step done, its scalars added to the interval."""
        torch.manual_seed((self.config.seed * 1_000_003 + step * 1009 + self.batches.rank) % 2**63)  # for dropout
        ids, visits = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in self.batches.share(step))
        self.read(step, ids, self.images)
        rows = Rows(self.images, ids, visits, self.labels[ids[: self.layout.labeled]], self.layout)
        report = self.program(rows)
        pending = report.pending
        unlabeled = processes.gather_rows({"ids": ids[self.layout.labeled :]})["ids"]
        self.interval.add(report.values, unlabeled, pending.get("pseudo_label"), pending.get("mask"))

    def pause(self) -> None:
        """Wait for the device, so that what follows is not counted as training, or the reverse."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = self.clock.lap()
        self.clock.training += seconds
        self.clock.interval += seconds

    def check_finite(self) -> None:
        """Raise NonFiniteError on all processes if any has met one."""
        bad = int(processes.least_in_place(self.program.state.bad_step.clone()).item())  # once per interval
        if bad != NEVER:
            raise NonFiniteError(bad, [int(i) for draw in self.batches.whole(bad) for i in draw.ids])

    def log(self, done: int) -> None:
        """Read the interval's sums, write them, begin the next one."""
        self.check_finite()
        steps = self.interval.steps
        means, pseudo_labels = self.interval.read()
        self.pause()
        per_second = steps * processes.count() / max(self.clock.interval, 1e-9)
        self.interval.reset()
        self.clock.interval = 0.0
        record = {
            "kind": "train",
            "step": done,
            "seconds": round(self.clock.total, 3),
            "lr": float(self.program.state.optimizer.param_groups[0]["lr"]),
            "images_per_second": per_second * self.layout.images,
            "rows_per_second": per_second * self.layout.total,
            "terms": {name: value for name, value in means.items() if not name.startswith("stat.")},
            "stats": {name.removeprefix("stat."): value for name, value in means.items() if name.startswith("stat.")},
            "pseudo_labels": pseudo_labels,
        }
        self.write(record)
        self.track({**means, "lr": record["lr"]}, done)
        used = f"  used {100 * pseudo_labels['used_fraction']:.0f}%" if pseudo_labels else ""
        rate = f"{record['images_per_second']:.0f} images/s"
        self.screen.news(done, f"loss {means['total']:.3f}{used}  {rate}{''.join(self.latest.values())}")
        self.clock.lap()  # files, trackers and screen are no training

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(record)

    @torch.no_grad()
    def confusions(self, eval_set: EvalSet) -> dict[str, np.ndarray]:
        """int64 [C, C] per head, rows the truth, over every image once; the method's own prediction under its name.

        Every process takes a contiguous share in forwards of one fixed size; rows that pad the last are not counted.
        """
        model, method = self.program.state.average.model, self.program.method
        processes.copy_from_first(model.buffers())  # with model.bn=local every process has its own
        n, classes = len(eval_set.labels), len(self.labeled_counts)
        share = -(-n // processes.count())
        size = min(-(-self.config.eval.batch // processes.count()), share)
        first = self.batches.rank * share
        counts: dict[str, Tensor] = {}
        for at in range(first, first + share, size):
            index = torch.arange(at, at + size, device=self.device)
            counted = index < min(first + share, n)
            index = index.clamp_max(n - 1)
            outputs = self.program.forward(model, self.plain_view(eval_set.images[index]))
            heads = outputs.logits | {method.predicts: method.logits(self.program.state.method, outputs)}
            for name, logits in heads.items():
                table = counts.setdefault(name, torch.zeros(classes, classes, dtype=torch.int64, device=self.device))
                add_pairs(table, eval_set.labels[index], logits.argmax(1), counted)
        return {name: processes.sum_in_place(table).cpu().numpy() for name, table in counts.items()}

    def record_evaluation(self, eval_set: EvalSet, done: int, *, last: bool) -> None:
        """Evaluate the averaged weights and write the record; the last one with its confusion matrices."""
        began = time.monotonic()
        confusions = self.confusions(eval_set)
        heads = {name: scores(table, self.labeled_counts) for name, table in confusions.items()}
        if last:
            for name, table in confusions.items():
                heads[name]["confusion"] = table.tolist()
        predicts = self.program.method.predicts
        record = {
            "kind": "eval",
            "step": done,
            "split": eval_set.name,
            "predicts": predicts,
            "heads": heads,
            "seconds": round(time.monotonic() - began, 3),
        }
        self.write(record)
        own = heads[predicts]
        self.track({f"{eval_set.name}.{k}": own[k] for k in ("top1", "balanced_accuracy")}, done)
        few = "" if own["few"] is None else f" few {own['few']:.1f}"
        self.latest[eval_set.name] = (
            f"  {eval_set.name} {own['top1']:.1f}% balanced {own['balanced_accuracy']:.1f}{few}"
        )

    def saved_tensors(self) -> list[tuple[str, Tensor]]:
        """The state of the step and the sums of the open log interval."""
        open_interval = [(f"interval.{name}", tensor) for name, tensor in self.interval.tensors()]
        return [*self.program.state.tensors(), *open_interval]

    def save(self, done: int) -> None:
        """Publish a checkpoint from the main process; never one that is not finite."""
        self.check_finite()
        self.interval.share()
        if self.metrics is None:
            return
        self.meta |= {
            "step": done,
            "seconds": self.clock.total,
            "cpu_seconds": self.clock.cpu,
            "training_seconds": self.clock.training,
            "interval_seconds": self.clock.interval,
            "metrics_bytes": self.metrics.flush(),
            "interval_steps": self.interval.steps,
            "interval_names": list(self.interval.sums),
            "scaler": self.program.state.scaler.state_dict(),
        }
        checkpoint.save(self.checkpoints, done, self.saved_tensors(), self.meta, keep=self.config.checkpoint.keep)

    def resume(self, saved: checkpoint.Checkpoint) -> int:
        """Take over the state of a checkpoint; returns the step to go on from."""
        meta = saved.meta
        self.interval.open(meta["interval_names"], meta["interval_steps"])
        checkpoint.restore(self.saved_tensors(), saved.tensors)
        if self.metrics is not None:
            checkpoint.retire_after(self.checkpoints, meta["step"])
        if meta["scaler"]:
            self.program.state.scaler.load_state_dict(meta["scaler"])
        seconds = (meta[key] for key in ("seconds", "cpu_seconds", "training_seconds", "interval_seconds"))
        self.clock = Clock(*seconds)
        return int(meta["step"])
