"""What a confusion matrix says, in percent, and what of a run's evaluations is quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SCORES = ("top1", "balanced_accuracy", "geometric_mean", "many", "medium", "few")
AVERAGED = 20
"""Evaluations behind the headline, where there are as many."""


def headline(values: Sequence[float | None]) -> float | None:
    """The number to quote of a score: its mean over the last AVERAGED evaluations, or those there are; without those
    that nothing decides (None or NaN), and None if that is all of them."""
    known = [value for value in values[-AVERAGED:] if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else None


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
