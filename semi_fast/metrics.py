"""Counts on the device and the scores that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semi_fast import processes


def add_pairs(counts: Tensor, truth: Tensor, predicted: Tensor, counted: Tensor) -> None:
    """counts[truth, predicted] += 1 for rows where `counted` (bool [n]); counts int64 [C, C], in place."""
    classes = counts.shape[1]
    cell = torch.where(counted, truth * classes + predicted, 0)
    counts.view(-1).index_add_(0, cell, counted.to(counts.dtype))


def class_groups(labeled_counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes by labeled frequency: the first third (rounded down) is many, the last few, the rest medium.

    Ties go by class index; with two classes the groups are one, none and one.
    """
    order = np.argsort(-np.asarray(labeled_counts), kind="stable").tolist()
    third = max(1, len(order) // 3)
    return {"many": order[:third], "medium": order[third : len(order) - third], "few": order[len(order) - third :]}


def scores(confusion: np.ndarray, labeled_counts: Sequence[int]) -> dict[str, Any]:
    """What a confusion matrix (int [C, C], rows the truth) says, in percent; None where no image decides it.

    top1; balanced_accuracy: mean recall over classes that occur; geometric_mean of recalls, zeros raised to
    1 / (100 C); many, medium, few: mean recall of `class_groups`; recall: [C].
    """
    confusion = confusion.astype(np.float64)
    occurring = confusion.sum(1)
    if not occurring.sum():
        raise ValueError("scores need at least one image; the confusion matrix is empty")
    recall = np.divide(confusion.diagonal(), occurring, out=np.full(len(confusion), np.nan), where=occurring > 0)

    def mean_recall(classes: list[int]) -> float | None:
        known = [recall[c] for c in classes if not np.isnan(recall[c])]
        return float(100 * np.mean(known)) if known else None

    known = recall[~np.isnan(recall)]
    floor = 1 / (100 * len(confusion))
    return {
        "top1": float(100 * confusion.trace() / confusion.sum()),
        "balanced_accuracy": float(100 * known.mean()),
        "geometric_mean": float(100 * np.exp(np.log(np.where(known == 0, floor, known)).mean())),
        **{name: mean_recall(classes) for name, classes in class_groups(labeled_counts).items()},
        "recall": [None if np.isnan(r) else float(100 * r) for r in recall],
    }


class Interval:
    """Sums over the steps of a log interval, kept on the device: loss terms, stats, and the fate of pseudo-labels."""

    def __init__(self, truth: Tensor, classes: int):
        """`truth` is int64 [samples]: the class of an unlabeled image, or -1 where unknown or a labeled copy.

        It lives here and not where a method could reach it.
        """
        self.truth, device = truth, truth.device
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.seen = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [truth, pseudo-label]
        self.used = torch.zeros_like(self.seen)
        self.rows = torch.zeros(2, dtype=torch.int64, device=device)  # unlabeled rows: masked in, all

    def add(self, values: dict[str, Tensor], ids: Tensor, pseudo_label: Tensor | None, mask: Tensor | None) -> None:
        """One step: scalars by name, and for the whole batch of unlabeled images ids, pseudo-label and mask [U]."""
        self.steps += 1
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros((), dtype=torch.float64, device=value.device))
            total.add_(value.detach())
        if pseudo_label is None or mask is None:
            return
        truth = self.truth[ids]
        known = truth >= 0
        add_pairs(self.seen, truth, pseudo_label, known)
        add_pairs(self.used, truth, pseudo_label, known & mask)
        self.rows += torch.stack([mask.sum(), torch.full_like(mask.sum(), len(mask))])

    def read(self) -> tuple[dict[str, float], dict[str, Any] | None]:
        """(means by name over steps and processes, fate of the pseudo-labels or None) since the last reset.

        Waits for the device.
        """
        values = processes.sum_in_place(torch.stack([*self.sums.values()])) / processes.count()
        means = {name: value / self.steps for name, value in zip(self.sums, values.tolist(), strict=True)}
        used_rows, rows = self.rows.tolist()
        if not rows:
            return means, None
        seen, used = self.seen.cpu(), self.used.cpu()
        return means, {
            "used_fraction": used_rows / rows,
            "seen": seen.sum(1).tolist(),
            "used": used.sum(1).tolist(),
            "correct": used.diagonal().tolist(),
            "predicted": used.sum(0).tolist(),
        }

    def reset(self) -> None:
        self.steps = 0
        for _, tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Name and storage of every sum."""
        sums = [(f"sum.{name}", tensor) for name, tensor in self.sums.items()]
        return [*sums, ("seen", self.seen), ("used", self.used), ("rows", self.rows)]

    def open(self, names: Sequence[str], steps: int) -> None:
        """Make room for the sums of these names, `steps` steps into an interval."""
        self.steps = steps
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=self.truth.device) for name in names}
