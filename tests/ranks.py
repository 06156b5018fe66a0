"""Runs of one process or several, forked from a server that has imported everything: a start costs no import."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semi_fast import train
from semi_fast.batch import Rows
from semi_fast.loop.fit import TrainingRun
from semi_fast.loop.preemption import Preemption
from semi_fast.loop.program import Program
from semi_fast.loop.step import StepReport, TrainStep
from semi_fast.schema.arguments import key_of

from .conftest import PATIENCE
from .tiny import ARGUMENTS

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "semi_fast.ops.rand_augment.cpu"])
EXCHANGES = ("all_reduce", "all_gather", "broadcast", "barrier")


@dataclass(frozen=True)
class Rank:
    """What became of one process of a run."""

    code: int | None
    output: str
    steps: list[dict[str, Tensor]]
    """By step: its share's `ids` and `visits`, the learning rate `lr`, and what was `pending` for the whole batch."""
    state: dict[str, Tensor]
    """All that steps write, as it was after the last one."""
    exchanges: list[str]
    """Every collective that Python called, with type and shape."""
    exchanges_of_steps: list[list[str]]


def run_of(
    count: int, data: Path, run_dir: Path, *flags: str, change: Callable[[], object] = bool, first: bool = False
) -> list[Rank]:
    """Train the small run in so many processes, in float64 if `flags` say nothing else; `change` is called in each one
    before it starts. With `first`, only the first process is waited for."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    given = (f"--data.path={data}", f"--run_dir={run_dir}", "--precision=fp64", *flags)
    words = [*ARGUMENTS, *{key_of(flag): flag for flag in given}.values()]  # of two for one key, the later one
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [run_dir.with_suffix(f".rank{rank}") for rank in range(count)]
    forks = [
        FORKS.Process(target=live, args=(rank, count, port, words, change, file), daemon=True)
        for rank, file in enumerate(files)
    ]
    for fork in forks:
        fork.start()
    end = time.monotonic() + PATIENCE
    for fork in forks[:1] if first else forks:
        fork.join(max(0.0, end - time.monotonic()))
    for fork in forks:
        fork.kill()  # where it hangs, as its exit code then says
        fork.join()
    outputs = [file.with_suffix(f"{file.suffix}.txt").read_text() for file in files]
    seen = [torch.load(file) if file.exists() else {} for file in files]
    return [
        Rank(fork.exitcode, output, **(empty() | found))
        for fork, output, found in zip(forks, outputs, seen, strict=True)
    ]


def empty() -> dict[str, Any]:
    return {"steps": [], "state": {}, "exchanges": [], "exchanges_of_steps": []}


def live(rank: int, count: int, port: int, words: list[str], change: Callable[[], object], file: Path) -> None:
    """A process from its start to its exit code."""
    with file.with_suffix(f"{file.suffix}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    train.write_report = lambda run_dirs, page: page  # half of so short a run's time, and of no interest here
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    seen = empty()
    watch(seen)
    change()
    code = train.main(words)
    torch.save(seen, file)
    raise SystemExit(code)


def watch(seen: dict[str, Any]) -> None:
    """Have the program note in `seen` what it does."""
    exchanges, one_step, work, fit = seen["exchanges"], TrainStep.__call__, Program.work, TrainingRun.fit

    def noted(name: str) -> Callable[..., Any]:
        exchange = getattr(dist, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            shapes = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in args if isinstance(tensor, Tensor)]
            exchanges.append(" ".join([name, *shapes]))
            return exchange(*args, **kwargs)

        return called

    for name in EXCHANGES:
        setattr(dist, name, noted(name))

    def watched_step(self: TrainStep, rows: Rows) -> StepReport:
        report = one_step(self, rows)
        lr = self.state.optimizer.param_groups[0]["lr"]
        step = {"ids": rows.ids, "visits": rows.visits, "lr": lr, **report.pending}
        seen["steps"].append({name: tensor.clone() for name, tensor in step.items()})
        return report

    def watched_work(self: Program) -> None:
        before = len(exchanges)
        work(self)
        seen["exchanges_of_steps"].append(exchanges[before:])

    def watched_fit(self: TrainingRun, start: int, preemption: Preemption) -> None:
        try:
            fit(self, start, preemption)
        finally:
            seen["state"] = {name: tensor.detach().clone() for name, tensor in self.program.changed()}

    TrainStep.__call__ = watched_step
    Program.work = watched_work
    TrainingRun.fit = watched_fit
