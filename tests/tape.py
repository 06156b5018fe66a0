"""What a CUDA graph does, on a CPU: operations recorded once with the memory that they use, then repeated.

Nothing of Python is run again by a replay, so whatever a step takes from Python instead of from its tensors is frozen
at its first value, as in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.measure import waits
from semi_fast.loop.capture import rehearse


class Tape(TorchDispatchMode):
    """Records what is dispatched; `replay` repeats it into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if waits(func, args):
            raise RuntimeError(f"{func} reads a value, which no graph can hold")
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Everything again."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True)
            for kept, made in pairs:
                if isinstance(kept, Tensor) and kept.numel() and kept.data_ptr() != made.data_ptr():
                    kept.copy_(made)


class Replay:
    """Stands in for `semi_fast.loop.capture.Graph`; recording computes, so what it changes is restored."""

    def __init__(self, work: Callable[[], None], pool: object):
        self.tape = Tape()

        def record() -> None:
            with self.tape:
                work()

        rehearse(record, work.__self__.changed, torch.device("cpu"), times=1)  # type: ignore[attr-defined]

    def __call__(self) -> None:
        with torch.no_grad():
            self.tape.replay()

    def close(self) -> None:
        self.tape.calls.clear()
