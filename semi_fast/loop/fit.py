"""The loop: step, evaluate, log, save; the only one, and the one that says when to wait for the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from semi_fast import processes
from semi_fast.loop.evaluation import Evaluation
from semi_fast.loop.journal import Journal
from semi_fast.loop.preemption import Preemption, stop
from semi_fast.loop.program import Program
from semi_fast.rundir import checkpoint
from semi_fast.rundir.scores import scores
from semi_fast.schema.config import Config

MOST_NOT_SAVED = 3
"""Checkpoints in a row that the disk may refuse before the run ends."""


@dataclass
class TrainingRun:
    """A configuration, the device work that it means, and what is told of it."""

    config: Config
    program: Program
    journal: Journal
    labeled_counts: Sequence[int]
    checkpoints: Path
    not_saved: int = 0
    """Checkpoints in a row."""

    def fit(self, start: int, preemption: Preemption) -> None:
        """Train from step `start` to the end.

        Raises NonFiniteError, after which nothing has been saved, and PreemptedError, after which everything has.
        """
        c, program, journal = self.config, self.program, self.journal
        journal.begin(start)
        for step in range(start, c.optim.steps):
            program.one_step(step)
            if step == start:
                journal.ready(program)
            done = step + 1
            last = done == c.optim.steps
            if last or done % c.eval.every == 0:
                program.check_finite()
                self.pause()
                for evaluation in program.evaluations:
                    self.evaluate(evaluation, done, last=last)
                journal.clock.lap()
            if last or done % c.log.every == 0:
                program.check_finite()
                journal.record_steps(program, done)
            asked = None if last else preemption.check(done)
            if last or asked or (c.checkpoint.every and done % c.checkpoint.every == 0):
                self.pause()
                self.save(done, must=last or asked is not None)
                journal.clock.lap()
            if asked:
                journal.screen.close()
                raise stop(asked, done, self.checkpoints.parent)
        journal.screen.close()

    def pause(self) -> None:
        """Wait for the device, so that what follows is not counted as training, or the reverse."""
        self.program.wait()
        self.journal.training_until_now()

    def evaluate(self, evaluation: Evaluation, done: int, *, last: bool) -> None:
        """Evaluate the averaged weights and record it; the last time with the confusion matrices."""
        began, step = time.monotonic(), self.program.train_step
        processes.copy_from_first(step.state.average.model.buffers())  # with model.bn=local each has its own
        confusions = evaluation.confusions()
        heads = {name: scores(table, self.labeled_counts) for name, table in confusions.items()}
        if last:
            for name, table in confusions.items():
                heads[name]["confusion"] = table.tolist()
        seconds = time.monotonic() - began
        self.journal.record_evaluation(evaluation.name, done, heads, predicts=step.method.predicts, seconds=seconds)

    def save(self, done: int, *, must: bool) -> None:
        """Publish a checkpoint from the main process; never one that is not finite, or not what all processes hold.

        What the disk does not take is tried twice; then the run goes on with a warning, unless it `must` be saved or
        this was the third time in a row: NotSavedError.
        """
        self.program.check_finite()
        self.program.interval.share()
        self.check_same(done)
        if self.journal.metrics is None:
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
                self.journal.screen.line(f"warning: {error}; going on, with the checkpoint before it")
            else:
                self.not_saved = 0
            return

    def publish(self, done: int) -> None:
        """Write what a resumed run needs."""
        tensors, meta = self.program.checkpoint_tensors(), self.journal.checkpoint_meta(done, self.program)
        checkpoint.save(self.checkpoints, done, tensors, meta, keep=self.config.checkpoint.keep)

    def check_same(self, done: int) -> None:
        """Raise RuntimeError on all processes if they have drifted apart."""
        own = ("running_mean", "running_var") if self.config.model.bn == "local" else ()
        tensors = [(name, tensor) for name, tensor in self.program.changed() if not name.endswith(own)]
        if odd := processes.differing(tensors):
            raise RuntimeError(
                f"all processes must hold the same state; after step {done} they differ in {odd[0]} and {len(odd) - 1} "
                "other tensors, and nothing was saved: --resume=auto goes on from the checkpoint before"
            )

    def resume(self, saved: checkpoint.Checkpoint) -> int:
        """Take over the state of a checkpoint; returns the step to go on from."""
        meta, scaler, interval = saved.meta, self.program.train_step.state.scaler, self.program.interval
        if meta["scaler"].keys() != scaler.state_dict().keys():
            raise ValueError(f"checkpoint {saved.path} does not fit this run: scaler has other keys; use a new run_dir")
        interval.open(meta["interval_terms"], meta["interval_stats"], meta["interval_steps"])
        checkpoint.restore(self.program.checkpoint_tensors(), saved.tensors)
        if self.journal.metrics is not None:
            self.journal.metrics.check(meta["metrics_bytes"])  # before anything is given up
            checkpoint.retire_after(self.checkpoints, meta["step"])
        scaler.load_state_dict(meta["scaler"])
        self.journal.resume(meta)
        return meta["step"]
