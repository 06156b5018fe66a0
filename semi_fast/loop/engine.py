"""The loop: step, log, evaluate, save; the only one, and the only place that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.batch import RowLayout, Rows
from semi_fast.errors import NonFiniteError
from semi_fast.loop.capture import WARM_UP, Graph
from semi_fast.loop.evaluation import Evaluation
from semi_fast.loop.levels import Level, settle
from semi_fast.loop.metrics import Interval
from semi_fast.loop.preemption import Preemption, stop
from semi_fast.loop.sampling import Batches, DeviceBatches
from semi_fast.loop.step import NEVER, Compiler, TrainStep
from semi_fast.rundir import checkpoint
from semi_fast.rundir.runlog import Clock, MetricsFile, Screen, changes
from semi_fast.rundir.scores import scores
from semi_fast.schema.config import Config

MOST_NOT_SAVED = 3
"""Checkpoints in a row that the disk may refuse before the run ends."""


class Reads(Protocol):
    """What the loop needs of a source; see `pipelines.source`."""

    def fetch(self, step: int, out: Tensor) -> None: ...

    def read(self, ids: Tensor, out: Tensor) -> None: ...


class Engine:
    """Drives a `TrainStep` over a configuration's steps."""

    def __init__(
        self,
        config: Config,
        program: TrainStep,
        source: Reads,
        batches: Batches,
        *,
        layout: RowLayout,
        resolution: tuple[int, int],
        labels: Tensor,
        interval: Interval,
        evaluations: Sequence[Evaluation],
        labeled_counts: Sequence[int],
        levels: tuple[Sequence[Level], str],
        metrics: MetricsFile | None,
        screen: Screen,
        checkpoints: Path,
        meta: dict[str, Any],
        track: Callable[[dict[str, float], int], None],
    ):
        """`labels` int64 [samples], -1 unless labeled; `levels` is what `levels.ladder` gives; `metrics` None but
        on the main process."""
        self.config, self.program, self.source, self.batches = config, program, source, batches
        self.layout, self.labels, self.interval, self.evaluations = layout, labels, interval, evaluations
        self.labeled_counts, (self.levels, self.why) = labeled_counts, levels
        self.metrics, self.screen, self.checkpoints, self.meta, self.track = metrics, screen, checkpoints, meta, track
        self.device, self.clock = labels.device, Clock()
        self.latest: dict[str, tuple[int, str]] = {}  # of each set: step of the last evaluation, and what it said
        self.images = torch.empty(layout.images, *resolution, 3, dtype=torch.uint8, device=self.device)
        self.draws = DeviceBatches(batches, self.device)
        self.sampling: Callable[[], tuple[Tensor, Tensor, Tensor]] = self.sample
        self.run: Callable[[], None] | None = None  # a step's device work at the level that was settled
        self.level: dict[str, Any] = {}
        self.start = 0  # the step that this process went on from
        self.not_saved = 0  # checkpoints in a row

    def fit(self, start: int, preemption: Preemption) -> None:
        """Train from step `start` to the end.

        Raises NonFiniteError, after which nothing has been saved, and PreemptedError, after which everything has.
        """
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
                for evaluation in self.evaluations:
                    self.record_evaluation(evaluation, done, last=last)
                self.clock.lap()
            if last or done % c.log.every == 0:
                self.log(done)
            asked = None if last else preemption.check(done)
            if last or asked or (c.checkpoint.every and done % c.checkpoint.every == 0):
                self.pause()
                self.save(done, must=last or asked is not None)
                self.clock.lap()
            if asked:
                self.screen.close()
                raise stop(asked, done, self.checkpoints.parent)
        self.screen.close()

    def one_step(self, step: int) -> None:
        """Everything that a step needs of the host, then its work on the device."""
        self.draws.renew(step)
        self.source.fetch(step, self.images)
        run = self.run or self.settle()
        torch.manual_seed((self.config.seed * 1_000_003 + step * 1009 + self.batches.rank) % 2**63)  # for dropout
        run()
        self.interval.steps += 1

    def settle(self) -> Callable[[], None]:
        """Bring the work to its level, now that the first rows are there; no time of training."""
        began = time.monotonic()
        first = int(self.program.state.step.item())  # a wait before the first step, and no other
        for step in range(first, first + WARM_UP):  # what a rehearsal reads
            self.draws.renew(step)
        self.run, level = settle(self, self.screen.line)
        seconds = round(time.monotonic() - began, 3)
        self.level = {"level": level.name, "compiled": level.compiled, "seconds": seconds}
        why = f" ({self.why})" if self.why else ""
        self.screen.line(f"engine: {level}{why}; ready after {seconds:.1f} s")
        before = self.meta.get("level", str(level))
        if before != str(level):
            self.note_changes([f"engine.level was {before}, is {level}"])
        self.meta["level"] = str(level)
        self.clock.lap()
        return self.run

    def close(self) -> None:
        """Let go of captured graphs."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # of a device that failed
                torch.cuda.synchronize(self.device)
        for run in (self.run, *(evaluation.run for evaluation in self.evaluations)):
            if isinstance(run, Graph):
                run.close()

    def work(self) -> None:
        """A step on the device, from the state's step alone: rows in, one update, its scalars added to the interval."""
        ids, visits, labels = self.sampling()
        self.source.read(ids, self.images)
        report = self.program(Rows(self.images, ids, visits, labels, self.layout))
        pending = report.pending
        unlabeled = processes.gather_rows({"ids": ids[self.layout.labeled :]})["ids"]
        self.interval.add(report.values, unlabeled, pending.get("pseudo_label"), pending.get("mask"))

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Who comes in this step: ids and visits [B + U] of this process, labels of the labeled rows [B]."""
        ids, visits = self.draws.share(self.program.state.step)
        return ids, visits, self.labels[ids[: self.layout.labeled]]

    def compile(self, compiled: Compiler) -> None:
        """From the next call on run what `compiled` makes of the parts of a step and of an evaluation."""
        self.sampling = compiled(self.sample)
        self.program.compile(compiled)
        self.interval.compile(compiled)
        for evaluation in self.evaluations:
            evaluation.run = compiled(evaluation.one_batch)

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
        evaluated = "".join(text if at == done else f"{text} (step {at})" for at, text in self.latest.values())
        self.screen.news(done, f"loss {means['total']:.3f}{used}  {rate}{evaluated}")
        self.clock.lap()  # files, trackers and screen are no training

    def write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.append(record)

    def record_evaluation(self, evaluation: Evaluation, done: int, *, last: bool) -> None:
        """Evaluate the averaged weights and write the record; the last one with its confusion matrices."""
        began = time.monotonic()
        processes.copy_from_first(self.program.state.average.model.buffers())  # with model.bn=local each has its own
        confusions = evaluation.confusions()
        heads = {name: scores(table, self.labeled_counts) for name, table in confusions.items()}
        if last:
            for name, table in confusions.items():
                heads[name]["confusion"] = table.tolist()
        predicts = self.program.method.predicts
        record = {
            "kind": "eval",
            "step": done,
            "split": evaluation.name,
            "predicts": predicts,
            "heads": heads,
            "seconds": round(time.monotonic() - began, 3),
        }
        self.write(record)
        own = heads[predicts]
        self.track({f"{evaluation.name}.{k}": own[k] for k in ("top1", "balanced_accuracy")}, done)
        few = "" if own["few"] is None else f" few {own['few']:.1f}"
        said = f"  {evaluation.name} {own['top1']:.1f}% balanced {own['balanced_accuracy']:.1f}{few}"
        self.latest[evaluation.name] = done, said

    def saved_tensors(self) -> list[tuple[str, Tensor]]:
        """The state of the step and the sums of the open log interval."""
        open_interval = [(f"interval.{name}", tensor) for name, tensor in self.interval.tensors()]
        return [*self.program.state.tensors(), *open_interval]

    def changed(self) -> Iterator[tuple[str, Tensor]]:
        """All that the work of a step writes and that outlives it."""
        yield from self.saved_tensors()
        yield from self.program.state.others()

    def check_same(self, done: int) -> None:
        """Raise RuntimeError on all processes if they have drifted apart."""
        own = ("running_mean", "running_var") if self.config.model.bn == "local" else ()
        odd = processes.differing([(name, tensor) for name, tensor in self.changed() if not name.endswith(own)])
        if odd:
            raise RuntimeError(
                f"all processes must hold the same state; after step {done} they differ in {odd[0]} and {len(odd) - 1} "
                "other tensors, and nothing was saved: --resume=auto goes on from the checkpoint before"
            )

    def save(self, done: int, *, must: bool) -> None:
        """Publish a checkpoint from the main process; never one that is not finite, or not what all processes hold.

        What the disk does not take is tried twice; then the run goes on with a warning, unless it `must` be saved or
        this was the third time in a row: NotSavedError.
        """
        self.check_finite()
        self.interval.share()
        self.check_same(done)
        if self.metrics is None:
            return
        for left in (1, 0):
            try:
                self.publish(done)
            except checkpoint.NotSavedError as error:
                if left:
                    continue
                self.not_saved += 1
                if must or self.not_saved == MOST_NOT_SAVED:
                    raise
                self.screen.line(f"warning: {error}; going on, with the checkpoint before it")
            else:
                self.not_saved = 0
            return

    def publish(self, done: int) -> None:
        """Write what a resumed run needs."""
        assert self.metrics is not None
        self.meta |= {
            "step": done,
            "seconds": self.clock.total,
            "cpu_seconds": self.clock.cpu,
            "training_seconds": self.clock.training,
            "interval_seconds": self.clock.interval,
            "metrics_bytes": self.metrics.flush(),
            "interval_steps": self.interval.steps,
            "interval_names": self.interval.names,
            "scaler": self.program.state.scaler.state_dict(),
        }
        checkpoint.save(self.checkpoints, done, self.saved_tensors(), self.meta, keep=self.config.checkpoint.keep)

    def resume(self, saved: checkpoint.Checkpoint) -> int:
        """Take over the state of a checkpoint; returns the step to go on from."""
        meta, scaler = saved.meta, self.program.state.scaler
        if meta["scaler"].keys() != scaler.state_dict().keys():
            raise ValueError(f"checkpoint {saved.path} does not fit this run: scaler has other keys; use a new run_dir")
        self.interval.open(meta["interval_names"], meta["interval_steps"])
        checkpoint.restore(self.saved_tensors(), saved.tensors)
        if self.metrics is not None:
            self.metrics.check(meta["metrics_bytes"])  # before anything is given up
            checkpoint.retire_after(self.checkpoints, meta["step"])
        scaler.load_state_dict(meta["scaler"])
        seconds = (meta[key] for key in ("seconds", "cpu_seconds", "training_seconds", "interval_seconds"))
        self.clock = Clock(*seconds)
        self.start = meta["step"]
        self.meta |= {"level": meta["level"], "changed_on_resume": meta["changed_on_resume"]}
        self.note_changes(changes(meta["environment"], self.meta["environment"]))
        return self.start

    def note_changes(self, found: list[str]) -> None:
        """Say what is not as it was before a resume, here and in what is saved."""
        if found:
            self.screen.line(f"warning: {', '.join(found)}: goes on equal but for rounding, not bit for bit")
        self.meta["changed_on_resume"] = [
            *self.meta["changed_on_resume"],
            *(f"after step {self.start}: {one}" for one in found),
        ]
