"""At which level a step runs: eager, forward and loss compiled, or the whole step as one CUDA graph; and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from semi_fast import processes
from semi_fast.capture import capture, rehearse
from semi_fast.evaluation import Evaluation
from semi_fast.ops import door
from semi_fast.schema.engine import EngineConfig
from semi_fast.step import TrainStep

GIB = 2**30


@dataclass(frozen=True)
class Level:
    """One rung of the ladder."""

    captured: bool
    compiled: bool
    autotune: bool = False
    ddp_parameters: int = 0
    """See `EngineConfig`; of the eager level."""

    @property
    def name(self) -> str:
        """The value of engine.level that it belongs to."""
        return "graph" if self.captured else "compile" if self.compiled else "eager"

    def __str__(self) -> str:
        parts = ["the whole step is one CUDA graph"] * self.captured
        parts += ["forward and loss are compiled"] * self.compiled
        return f"{self.name}: {', '.join(parts) or 'every operation is dispatched'}"


def ladder(
    options: EngineConfig, device: torch.device, *, several_processes: bool, synchronised: bool
) -> tuple[list[Level], str]:
    """(the levels to try, best first, and why better ones are left out); ValueError for one that cannot be.

    `synchronised`: batch normalisation exchanges its statistics within the forward.
    """
    no_graph = graph_obstacle(device, several_processes=several_processes)
    no_compiler = compile_obstacle(device, synchronised=synchronised)
    eager = Level(captured=False, compiled=False, ddp_parameters=options.ddp_parameters)
    compiled = Level(captured=False, compiled=True, autotune=options.autotune)
    graphs = [Level(captured=True, compiled=False)]
    if not no_compiler:
        graphs.insert(0, Level(captured=True, compiled=True, autotune=options.autotune))
    if options.level == "eager":
        return [eager], ""
    if options.level == "graph":
        if no_graph:
            raise ValueError(f"engine.level=graph cannot be: {no_graph}; use --engine.level=auto")
        return graphs[:1], f"not compiled: {no_compiler}" if no_compiler else ""
    if options.level == "compile":
        if no_compiler:
            raise ValueError(f"engine.level=compile cannot be: {no_compiler}; use --engine.level=auto")
        return [compiled], ""
    if device.type != "cuda":
        return [eager], f"{no_graph}; --engine.level=compile starts slowly there"
    levels = [] if no_graph else graphs
    levels += [] if no_compiler else [compiled]
    return [*levels, eager], "; ".join(filter(None, (no_graph, no_compiler)))


def graph_obstacle(device: torch.device, *, several_processes: bool) -> str:
    """Why no step can be captured; empty where it can."""
    if device.type != "cuda":
        return f"a {device.type} has no CUDA graphs"
    if several_processes and dist.get_backend() != "nccl":
        return f"the processes exchange by {dist.get_backend()}, which a graph cannot hold"
    return ""


def compile_obstacle(device: torch.device, *, synchronised: bool) -> str:
    """Why torch.compile cannot take forward and loss; empty where it can."""
    if synchronised:
        return "model.bn=sync exchanges statistics within the forward, which torch.compile does not follow"
    if device.type == "cuda" and door.OBSTACLE:
        return f"{door.OBSTACLE}, and torch.compile needs it"
    return ""


class Steps(Protocol):
    """What is brought to a level: the engine."""

    program: TrainStep
    evaluations: Sequence[Evaluation]
    levels: Sequence[Level]
    device: torch.device

    def changed(self) -> Iterable[tuple[str, Tensor]]: ...

    def work(self) -> None: ...


def settle(steps: Steps, say: Callable[[str], None]) -> tuple[Callable[[], None], Level]:
    """(a step's work at the first of the levels that can be carried out, that level); nothing has been trained.

    A level that fails is named, with the reason, and the next one is tried, by all processes together. Raises
    RuntimeError in one line if none is left, or when the memory does not suffice.
    """
    for level in steps.levels:
        failure: RuntimeError | None = None
        try:
            run = prepared(steps, level)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(out_of_memory(steps.device, error)) from error
        except RuntimeError as error:  # also what torch.compile and a capture raise
            failure = error
        fine = torch.tensor(int(failure is None), device=steps.device)
        if processes.least_in_place(fine).item():  # once, before training
            return run, level  # pyright: ignore[reportPossiblyUnboundVariable], bound without a failure
        reason = first_line(failure) if failure else "another process failed"
        if level is steps.levels[-1]:
            other = "a method, model or plug-in that works" if level.name == "eager" else "--engine.level=auto"
            raise RuntimeError(f"engine.level={level.name} failed: {reason}; use {other}") from failure
        say(f"engine: {level.name} failed ({reason}); trying the next level")
        steps.program.stop_compiling()
    raise AssertionError("there is at least one level")


def prepared(steps: Steps, level: Level) -> Callable[[], None]:
    """A step's work at this level, tried out where that can fail, without a trace; evaluation as far as captured."""
    if level.compiled:
        steps.program.compile(autotune=level.autotune)
    parameters = sum(p.numel() for p in steps.program.state.model.parameters())
    if level.name == "eager" and processes.count() > 1 and parameters >= level.ddp_parameters:
        steps.program.overlap_exchange()
    if steps.device.type == "cpu" and level.name == "eager":
        return steps.work
    rehearse(steps.work, steps.changed, steps.device)
    for evaluation in steps.evaluations:
        rehearse(evaluation.one_batch, evaluation.changed, steps.device)
        evaluation.run = capture(evaluation.one_batch) if level.captured else evaluation.one_batch
    return capture(steps.work) if level.captured else steps.work


def out_of_memory(device: torch.device, error: torch.OutOfMemoryError) -> str:
    """What did not fit, how much there is, and what to change."""
    free, total = (n / GIB for n in torch.cuda.mem_get_info(device))
    peak = torch.cuda.max_memory_allocated(device) / GIB
    return (
        f"out of memory at the first step: {first_line(error)} This run had taken {peak:.1f} GiB, {free:.1f} of "
        f"{total:.1f} GiB are free; lower --batch.labeled or --eval.batch, or use --precision=bf16"
    )


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
