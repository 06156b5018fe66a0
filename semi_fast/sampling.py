"""Which images a step sees: a pure function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from semi_fast.philox import ORDER_LABELED, ORDER_UNLABELED, shuffled


class Draw(NamedTuple):
    """Sample ids and how often their stream has come round before: int64 [n] each."""

    ids: np.ndarray
    visits: np.ndarray


class Stream:
    """An endless sequence of sample ids: every visit is the whole set in its own order, one visit after the other."""

    def __init__(self, ids: np.ndarray, *, seed: int, stream: int):
        if len(ids) == 0:
            raise ValueError("a stream needs at least one sample; the split has none: check split.*")
        self.ids = np.sort(np.asarray(ids, dtype=np.int64))
        self.order = lru_cache(maxsize=4)(lambda visit: shuffled(self.ids, seed, stream, visit))

    def take(self, start: int, count: int) -> Draw:
        """The samples at positions start .. start + count - 1."""
        positions = np.arange(start, start + count, dtype=np.int64)
        visits, within = np.divmod(positions, len(self.ids))
        ids = np.empty(count, dtype=np.int64)
        for visit in np.unique(visits):
            here = visits == visit
            ids[here] = self.order(int(visit))[within[here]]
        return Draw(ids, visits)


class Batches:
    """The global batch of every step, and the part of one process: a contiguous share of each stream's rows."""

    def __init__(
        self,
        labeled: np.ndarray,
        unlabeled: np.ndarray,
        *,
        seed: int,
        labeled_rows: int,
        unlabeled_rows: int,
        rank: int = 0,
        processes: int = 1,
    ):
        for key, rows in (("batch.labeled", labeled_rows), ("the unlabeled batch", unlabeled_rows)):
            if rows % processes:
                raise ValueError(f"{key} must be divisible by the number of processes; got {rows} and {processes}")
        self.streams = [(Stream(labeled, seed=seed, stream=ORDER_LABELED), labeled_rows)]
        if unlabeled_rows:
            self.streams.append((Stream(unlabeled, seed=seed, stream=ORDER_UNLABELED), unlabeled_rows))
        self.rank, self.processes = rank, processes

    def whole(self, step: int) -> list[Draw]:
        """The labeled and, where there are any, the unlabeled samples of a step, over all processes."""
        return [stream.take(step * rows, rows) for stream, rows in self.streams]

    def share(self, step: int) -> Draw:
        """This process's samples, labeled first: [B + U]."""
        parts = []
        for ids, visits in self.whole(step):
            n = len(ids) // self.processes
            mine = slice(self.rank * n, (self.rank + 1) * n)
            parts.append(Draw(ids[mine], visits[mine]))
        return Draw(*(np.concatenate(field) for field in zip(*parts, strict=True)))
