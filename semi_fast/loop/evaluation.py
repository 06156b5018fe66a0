"""Evaluation: every image of a set once, in forwards of one fixed size, counted on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.loop.metrics import add_pairs

BATCH = {"cuda": 512, "cpu": 64}  # a CPU's caches hold the activations of no more


@dataclass
class EvalSet:
    """Images that are evaluated, all of them, on the device."""

    name: str
    images: Tensor  # uint8 [n, H, W, 3]
    labels: Tensor  # int64 [n]


class Evaluation:
    """Confusion matrices over an `EvalSet`; every process takes a contiguous share."""

    def __init__(
        self,
        eval_set: EvalSet,
        predict: Callable[[Tensor], dict[str, Tensor]],
        *,
        names: Iterable[str],
        classes: int,
        batch: int | None,
        rank: int,
    ):
        """`predict` gives logits [n, C] by these names, from uint8 images [n, H, W, 3]; `batch` images a forward, over
        all processes, None for as many as suit the device."""
        self.name, self.set, self.predict = eval_set.name, eval_set, predict
        n, device = len(eval_set.labels), eval_set.labels.device
        share = -(-n // processes.count())
        self.first, self.end = rank * share, min((rank + 1) * share, n)
        self.size = min(-(-(batch or BATCH[device.type]) // processes.count()), share)
        self.batches = -(-share // self.size)
        self.at = torch.zeros((), dtype=torch.int64, device=device)
        self.index = torch.arange(self.size, device=device)
        self.counts = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in names}
        self.run: Callable[[], None] = self.one_batch

    @torch.no_grad()
    def one_batch(self) -> None:
        """Count the images from `at` on and move it; device work alone. Rows that pad the last one are not counted."""
        index = self.at + self.index
        counted = index < self.end
        index = index.clamp_max(len(self.set.labels) - 1)
        for name, logits in self.predict(self.set.images[index]).items():
            add_pairs(self.counts[name], self.set.labels[index], logits.argmax(1), counted)
        self.at += self.size

    def changed(self) -> list[tuple[str, Tensor]]:
        """Name and storage of what `one_batch` writes."""
        return [("at", self.at), *self.counts.items()]

    def confusions(self) -> dict[str, np.ndarray]:
        """int64 [C, C] by name, rows the truth, over every image once. Waits for the device."""
        for counts in self.counts.values():
            counts.zero_()
        self.at.fill_(self.first)
        for _ in range(self.batches):
            self.run()
        return {name: processes.sum_in_place(counts.clone()).cpu().numpy() for name, counts in self.counts.items()}
