"""Counts on the device, and what a log interval sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.loop.step import StepReport


def add_pairs(counts: Tensor, truth: Tensor, predicted: Tensor, counted: Tensor) -> None:
    """counts[truth, predicted] += 1 for rows where `counted` (bool [n]); counts int64 [C, C], in place.

    Compiled, adding int64 by index would sort; int32 is added atomically.
    """
    classes = counts.shape[1]
    cell = torch.where(counted, truth * classes + predicted, 0)
    added = torch.zeros(counts.numel(), dtype=torch.int32, device=counts.device)
    counts += added.index_add_(0, cell, counted.to(torch.int32)).view_as(counts)


class Interval:
    """Sums over the steps of a log interval, kept on the device: loss terms, stats, and the fate of pseudo-labels."""

    def __init__(self, truth: Tensor, classes: int):
        """`truth` is int64 [samples]: the class of an unlabeled image, or -1 where unknown or a labeled copy.

        It lives here and not where a method could reach it.
        """
        self.truth, device = truth, truth.device
        self.terms: list[str] = []
        self.stats: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)  # of the terms, then of the stats
        self.steps = 0
        self.seen = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [truth, pseudo-label]
        self.used = torch.zeros_like(self.seen)
        self.rows = torch.zeros(2, dtype=torch.int64, device=device)  # unlabeled rows: masked in, all
        self.count: Callable[..., None] = self.add_stacked

    def add(self, report: StepReport, ids: Tensor) -> None:
        """One step: its scalars, and of the whole batch of unlabeled images with these ids [U] the pseudo-labels.

        Device work alone, so that it can be captured; who runs the step counts `steps`.
        """
        if not self.terms:
            self.open(list(report.terms), list(report.stats), self.steps)
        scalars = torch.stack([*report.terms.values(), *report.stats.values()])
        self.count(scalars, ids, report.pending.get("pseudo_label"), report.pending.get("mask"))

    def compile(self, compiled: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
        """From the next call on run what `compiled` makes of the sums."""
        self.count = compiled(self.add_stacked)

    def add_stacked(self, values: Tensor, ids: Tensor, pseudo_label: Tensor | None, mask: Tensor | None) -> None:
        """`add` with the scalars in one vector, in the order of the names."""
        self.sums += values.double()
        if pseudo_label is None or mask is None:
            return
        truth = self.truth[ids]
        known = truth >= 0
        add_pairs(self.seen, truth, pseudo_label, known)
        add_pairs(self.used, truth, pseudo_label, known & mask)
        self.rows += torch.stack([mask, torch.ones_like(mask)]).sum(1)

    def read(self) -> tuple[dict[str, float], dict[str, float], dict[str, Any] | None]:
        """(means of the terms, of the stats, over steps and processes; fate of the pseudo-labels or None) since the
        last reset.

        Waits for the device.
        """
        self.share()
        means = [value / self.steps for value in self.sums.tolist()]
        terms = dict(zip(self.terms, means[: len(self.terms)], strict=True))
        stats = dict(zip(self.stats, means[len(self.terms) :], strict=True))
        used_rows, rows = self.rows.tolist()
        if not rows:
            return terms, stats, None
        seen, used = self.seen.cpu(), self.used.cpu()
        return (
            terms,
            stats,
            {
                "used_fraction": used_rows / rows,
                "seen": seen.sum(1).tolist(),
                "used": used.sum(1).tolist(),
                "correct": used.diagonal().tolist(),
                "predicted": used.sum(0).tolist(),
            },
        )

    def share(self) -> None:
        """Replace every process's sums of scalars by their mean over processes."""
        if self.terms and processes.count() > 1:
            processes.sum_in_place(self.sums).div_(processes.count())

    def reset(self) -> None:
        self.steps = 0
        for _, tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Name and storage of every sum."""
        return [("sums", self.sums), ("seen", self.seen), ("used", self.used), ("rows", self.rows)]

    def open(self, terms: list[str], stats: list[str], steps: int) -> None:
        """Make room for the sums of these terms and stats, `steps` steps into an interval."""
        self.terms, self.stats, self.steps = terms, stats, steps
        self.sums = torch.zeros(len(terms) + len(stats), dtype=torch.float64, device=self.truth.device)
