"""The device work of a run: a step from its rows to its sums, and evaluations; brought to a level before the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.batch import RowLayout, Rows
from semi_fast.errors import NonFiniteError
from semi_fast.loop.capture import WARM_UP, CaptureError, Graph, memory_pool, rehearse
from semi_fast.loop.evaluation import Evaluation
from semi_fast.loop.levels import Level, compiler, no_room, out_of_memory, said
from semi_fast.loop.metrics import Interval
from semi_fast.loop.sampling import Batches, DeviceBatches
from semi_fast.loop.step import NEVER, Compiler, TrainStep


class Reads(Protocol):
    """What the loop needs of a source; see `pipelines.source`."""

    def fetch(self, step: int, out: Tensor) -> None: ...

    def read(self, ids: Tensor, out: Tensor) -> None: ...


@dataclass
class Program:
    """What runs on the device, and what a step needs of the host before it."""

    train_step: TrainStep
    source: Reads
    batches: Batches
    layout: RowLayout
    images: Tensor
    """uint8 [B + U, H, W, 3]: what the source reads into."""
    labels: Tensor
    """int64 [samples], -1 unless labeled."""
    interval: Interval
    evaluations: Sequence[Evaluation]
    levels: Sequence[Level]
    """To try, best first."""
    why: str
    """Better ones are left out; empty if none are."""
    seed: int
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.device = self.labels.device
        self.draws = DeviceBatches(self.batches, self.device)
        self.sampling: Callable[[], tuple[Tensor, Tensor, Tensor]] = self.sample
        self.run: Callable[[], None] | None = None  # a step's device work at its level
        self.level: Level | None = None
        self.ready_at = 0.0  # by the monotonic clock
        self.prepared: dict[str, Any] = {}
        """`level`, whether it is `compiled`, and the `seconds` that it took to get ready."""

    def one_step(self, step: int) -> None:
        """Everything that a step needs of the host, then its work on the device."""
        self.draws.renew(step)
        self.source.fetch(step, self.images)
        run = self.run or self.prepare()
        torch.manual_seed((self.seed * 1_000_003 + step * 1009 + self.batches.rank) % 2**63)  # for dropout
        run()
        self.interval.steps += 1

    def work(self) -> None:
        """A step on the device, from the state's step alone: rows in, one update, its scalars added to the interval."""
        ids, visits, labels = self.sampling()
        self.source.read(ids, self.images)
        loss = self.train_step(Rows(self.images, ids, visits, labels, self.layout))
        unlabeled = processes.gather_rows({"ids": ids[self.layout.labeled :]})["ids"]
        self.interval.add(loss, unlabeled)

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Who comes in this step: ids and visits [B + U] of this process, labels of the labeled rows [B]."""
        ids, visits = self.draws.share(self.train_step.state.step)
        return ids, visits, self.labels[ids[: self.layout.labeled]]

    def prepare(self) -> Callable[[], None]:
        """Bring the work to the first level that can be carried out, now that the first rows are there; nothing is
        trained. Returns a step's work.

        A level whose rehearsal fails is named, with the reason, and the next one is tried. Raises RuntimeError in one
        line if none is left, when the memory does not suffice, when a capture fails, after which torch cannot go on,
        and when one of several processes fails.
        """
        began = time.monotonic()
        first = int(self.train_step.state.step.item())  # a wait before the first step, and no other
        for step in range(first, first + WARM_UP):  # what a rehearsal reads
            self.draws.renew(step)
        for level in self.levels:
            try:
                self.run, self.level = self.at(level), level
                break
            except ValueError:
                raise
            except Exception as error:  # compilers raise what they like
                if memory := out_of_memory(error):
                    raise RuntimeError(no_room(memory, self.device, self.train_step.precision)) from error
                if isinstance(error, CaptureError):
                    line = f"the step could not be captured: {said(error)}; use --engine.level=compile"
                    raise RuntimeError(line) from error
                if level is self.levels[-1] or processes.count() > 1:
                    other = "another method or model" if level.name == "eager" else "--engine.level=eager"
                    raise RuntimeError(f"engine.level={level.name} failed: {said(error)}; use {other}") from error
                self.say(f"engine: {level.name} failed ({said(error)}); trying the next level")
                self.compile(lambda function: function)
        else:
            raise AssertionError("there is at least one level")
        seconds = round(time.monotonic() - began, 3)
        self.prepared = {"level": level.name, "compiled": level.compiled, "seconds": seconds}
        why = f" ({self.why})" if self.why else ""
        self.say(f"engine: {level}{why}; ready after {seconds:.1f} s")
        self.ready_at = time.monotonic()
        return self.run

    def at(self, level: Level) -> Callable[[], None]:
        """A step's work at a level, tried out where that can fail, without a trace; evaluations as far as captured."""
        if level.compiled:
            self.compile(compiler(level))
        parameters = sum(p.numel() for p in self.train_step.state.model.parameters())
        if level.name == "eager" and processes.count() > 1 and parameters >= level.ddp_parameters:
            self.train_step.overlap_exchange()
        if self.device.type == "cpu" and level.name == "eager":
            return self.work
        rehearse(self.work, self.changed, self.device)
        self.train_step.state.optimizer.zero_grad(set_to_none=True)  # a graph has gradients of its own
        pool = memory_pool(self.device)
        for evaluation in self.evaluations:
            rehearse(evaluation.run, evaluation.changed, self.device)
            evaluation.run = Graph(evaluation.run, pool) if level.captured else evaluation.run
        return Graph(self.work, pool) if level.captured else self.work

    def compile(self, compiled: Compiler) -> None:
        """From the next call on run what `compiled` makes of the parts of a step and of an evaluation."""
        self.sampling = compiled(self.sample)
        self.train_step.compile(compiled)
        self.interval.compile(compiled)
        for evaluation in self.evaluations:
            evaluation.run = compiled(evaluation.one_batch)

    def checkpoint_tensors(self) -> list[tuple[str, Tensor]]:
        """What a checkpoint holds: the state of the step and the sums of the open log interval."""
        open_interval = [(f"interval.{name}", tensor) for name, tensor in self.interval.tensors()]
        return [*self.train_step.state.tensors(), *open_interval]

    def changed(self) -> Iterator[tuple[str, Tensor]]:
        """All that the work of a step writes and that outlives it."""
        yield from self.checkpoint_tensors()
        yield from self.train_step.state.others()

    def check_finite(self) -> None:
        """Raise NonFiniteError on all processes if any has met one. Waits for the device."""
        least = processes.least_in_place(self.train_step.state.bad_step.clone())
        bad = int(least.item())  # a wait between steps, where the loop evaluates, logs or saves
        if bad != NEVER:
            raise NonFiniteError(bad, [int(i) for draw in self.batches.whole(bad) for i in draw.ids])

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of captured graphs."""
        with suppress(RuntimeError):  # of a device that failed
            self.wait()
        for run in (self.run, *(evaluation.run for evaluation in self.evaluations)):
            if isinstance(run, Graph):
                run.close()
