"""Device work as one CUDA graph: warmed up, its traces undone, captured once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
    with torch.cuda.stream(side):
        for _ in range(times):
            work()
    here.wait_stream(side)


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """`work`, which has been rehearsed, as a graph that is replayed; nothing is computed here.

    Threads that read ahead go on meanwhile: only this one is watched for what a capture must not do.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
