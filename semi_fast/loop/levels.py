"""At which level a step runs: eager, forward and loss compiled, or the whole step as one CUDA graph; and why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from semi_fast.loop.step import AUTOCAST, Compiler
from semi_fast.ops import door
from semi_fast.schema.engine import EngineConfig

GIB = 2**30
NO_MEMORY = re.compile(r"(?i)\bout of memory\b|STATUS_(ALLOC_FAILED|INTERNAL_ERROR_\w*ALLOCATION_FAILED)")
"""What drivers, cuBLAS, cuDNN and Triton say; torch raises them as plain RuntimeErrors."""


@dataclass(frozen=True)
class Level:
    """One rung of the ladder."""

    captured: bool
    compiled: bool
    autotune: bool = False
    deterministic: bool = False
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
    choices = {"autotune": options.autotune, "deterministic": options.deterministic}
    eager = Level(captured=False, compiled=False, ddp_parameters=options.ddp_parameters)
    compiled = Level(captured=False, compiled=True, **choices)
    graphs = [Level(captured=True, compiled=False)]
    if not no_compiler:
        graphs.insert(0, Level(captured=True, compiled=True, **choices))
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


def inductor_options(level: Level) -> dict[str, Any]:
    """How torch.compile makes code, small kernels that do not depend on one another as one.

    As Inductor's own switches they would hold for what the process does next, and on a GPU not for the backward: they
    are a thread's, and autograd has it compiled in one of its own.
    """
    tuned = {"max_autotune": True, "coordinate_descent_tuning": True} if level.autotune else {}
    return {"combo_kernels": True, "deterministic": level.deterministic, **tuned}


def compiler(level: Level) -> Compiler:
    """torch.compile of whole functions of fixed shapes."""
    options = inductor_options(level)
    return lambda function: torch.compile(function, fullgraph=True, dynamic=False, options=options)


@contextmanager
def switches(options: EngineConfig, device: torch.device) -> Iterator[None]:
    """torch's switches as a run needs them, later compilations too; afterwards as they were, also on a failure."""
    # torch's cache of compiled code does not look into an operation's own gradient
    wanted: list[tuple[Any, str, Any]] = [
        (torch.compiler.config, "cache_key_tag", f"semi_fast {sources_of_operations()}")
    ]
    with ExitStack() as stack:
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            wanted.append((cudnn, "benchmark", not options.deterministic))  # shapes are fixed
            wanted.append((cudnn, "deterministic", options.deterministic))
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")
        for owner, name, value in wanted:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@cache
def sources_of_operations() -> str:
    """A digest of the files under `ops`."""
    files = sorted(Path(door.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """What was raised, or the first thing that led to it, if memory was short: to torch, or to a library."""
    found = None
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error)):
            found = error
        error = error.__cause__ or error.__context__
    return found


def no_room(error: BaseException, device: torch.device, precision: str) -> str:
    """What did not fit, how much there is, and what to change."""
    free, total = (n / GIB for n in torch.cuda.mem_get_info(device))
    peak = torch.cuda.max_memory_allocated(device) / GIB
    half = "" if precision in AUTOCAST else ", or use --precision=bf16"
    return (
        f"out of memory at the first step: {said(error)} This run had taken {peak:.1f} GiB, {free:.1f} of "
        f"{total:.1f} GiB are free; lower --batch.labeled or --eval.batch{half}"
    )


def said(error: BaseException) -> str:
    """The first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
