"""Device work as one CUDA graph: warmed up, its traces undone, captured once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: compilers, cuDNN's search and the allocator are done after them."""


Changed = Callable[[], Iterable[tuple[str, Tensor]]]


def rehearse(work: Callable[[], None], changed: Changed, device: torch.device, *, times: int = WARM_UP) -> None:
    """Call `work` and restore what it `changed`: name and storage of all that it writes and that outlives a call.

    On a GPU the calls run on a stream of their own, as a capture does. A tensor that the first call makes, or gives its
    shape, is set to zero. What `work` writes before it reads need not be named.
    """
    before = {name: tensor.clone() for name, tensor in changed()}
    try:
        on_side_stream(work, device, times)
    finally:
        for name, tensor in changed():
            kept = before.get(name)
            if kept is None or kept.shape != tensor.shape:
                kept = torch.zeros_like(tensor)
            tensor.detach().copy_(kept)


def on_side_stream(work: Callable[[], None], device: torch.device, times: int) -> None:
    """Call `work` some times, in order with what comes before and after on the current stream."""
    if device.type != "cuda":
        for _ in range(times):
            work()
        return
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            for _ in range(times):
                work()
    finally:
        here.wait_stream(side)  # what failed may have been half done
    torch.cuda.empty_cache()  # torch keeps memory for the stream that used it, and this one is not used again


class CaptureError(RuntimeError):
    """A function that a graph cannot hold; torch leaves the process in a state in which no more should be captured."""


class Graph:
    """A function, which has been rehearsed, as a graph: calling it repeats what was captured."""

    def __init__(self, work: Callable[[], None], pool: Any):
        """Nothing is computed here. Graphs of one `pool`, from `memory_pool`, share memory and never run at once.

        Threads that read ahead go on meanwhile: only this one is watched for what a capture must not do. Raises
        CaptureError with what made it fail.
        """
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                work()
        except Exception as error:
            cause: BaseException = error
            while cause.__context__ is not None:  # torch ends the capture first, which raises an error of its own
                cause = cause.__context__
            raise CaptureError(f"{type(cause).__name__}: {cause}") from error

    def __call__(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        """Let go of its memory, and of the processes' communicator, which cannot end before."""
        self.graph.reset()


def memory_pool(device: torch.device) -> Any:
    """For the graphs of one run."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
