"""Which images a step sees: a pure function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from semi_fast.philox import ORDER_LABELED, ORDER_UNLABELED, philox, shuffled
from semi_fast.prepared.manifest import Manifest, Split

STEPS_AT_ONCE = 16
"""For how many steps at least the orders on the device are made together."""


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
        self.seed, self.stream = seed, stream
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

    def slice(self, rows: int) -> slice:
        """This process's part of `rows` rows of the global batch."""
        n = rows // self.processes
        return slice(self.rank * n, (self.rank + 1) * n)

    def share(self, step: int) -> Draw:
        """This process's samples, labeled first: [B + U]."""
        parts = []
        for ids, visits in self.whole(step):
            mine = self.slice(len(ids))
            parts.append(Draw(ids[mine], visits[mine]))
        return Draw(*(np.concatenate(field) for field in zip(*parts, strict=True)))


class DeviceStream:
    """A `Stream` on the device: the orders of some visits, renewed between steps, from which a step picks its rows."""

    def __init__(self, stream: Stream, *, rows: int, share: slice, device: torch.device):
        """`rows` are the global batch's of this stream, `share` those of this process among them."""
        self.rows, self.key = rows, (stream.seed, stream.stream)
        self.ids = torch.from_numpy(stream.ids).to(device)
        self.mine = torch.arange(share.start, share.stop, device=device)
        self.visits = -(-STEPS_AT_ONCE * rows // len(self.ids))  # in each of two blocks, used in turn
        self.table = self.ids.repeat(2, self.visits, 1)  # samples of the stream, whoever reads ahead of `renew`
        self.held = [-1, -1]

    def renew(self, step: int) -> None:
        """Make the orders that `step` needs, on the device, where they have not been made yet."""
        samples = self.visits * len(self.ids)
        for block in {step * self.rows // samples, ((step + 1) * self.rows - 1) // samples}:
            if self.held[block % 2] != block:
                first = torch.arange(self.visits, device=self.ids.device).unsqueeze(1) + block * self.visits
                seed, stream = self.key
                counter = torch.broadcast_tensors(torch.full_like(first, stream), first, self.ids, 0 * first)
                order = philox(seed, counter)[0].argsort(dim=1, stable=True)  # ties by id: the ids ascend
                self.table[block % 2] = self.ids[order]
                self.held[block % 2] = block

    def take(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, visits) of this process's rows at `step`, int64 scalar on the device: int64 [n] each."""
        position = step * self.rows + self.mine
        return self.table.view(-1)[position % self.table.numel()], position // len(self.ids)


class DeviceBatches:
    """`Batches.share` on the device, as part of the step: a function of the step's tensor."""

    def __init__(self, batches: Batches, device: torch.device):
        self.streams = [
            DeviceStream(stream, rows=rows, share=batches.slice(rows), device=device)
            for stream, rows in batches.streams
        ]

    def renew(self, step: int) -> None:
        """What must be made, outside the step, before `step` can run."""
        for stream in self.streams:
            stream.renew(step)

    def share(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, visits), labeled first: int64 [B + U] each."""
        ids, visits = zip(*(stream.take(step) for stream in self.streams), strict=True)
        return torch.cat(ids), torch.cat(visits)


def label_tables(manifest: Manifest, split: Split) -> tuple[Tensor, Tensor]:
    """(labels of labeled samples, truth of unlabeled ones that are no labeled copies): int64 [samples], else -1.

    Two tables, so that what a method is given holds nothing that it must not know.
    """
    known = torch.from_numpy(manifest.labels("train").copy())
    labels = torch.full((manifest.length("train") + manifest.length("unlabeled"),), -1, dtype=torch.int64)
    truth = labels.clone()
    truth[: len(known)] = known
    labels[split.labeled] = known[split.labeled]
    truth[split.labeled] = -1
    return labels, truth


def first_visit_counts(manifest: Manifest, split: Split, *, seed: int, rows: int) -> tuple[int, ...]:
    """Labeled images per class in the full batches of the first visit: what a loader that drops the last would show."""
    order = Stream(split.labeled, seed=seed, stream=ORDER_LABELED).order(0)
    seen = order[: len(order) // rows * rows]
    return tuple(np.bincount(manifest.labels("train")[seen], minlength=manifest.num_classes).tolist())
