"""Scores against scikit-learn, and the counts they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score

from semi_fast.loop.metrics import Interval, add_pairs
from semi_fast.loop.step import StepReport
from semi_fast.rundir.scores import AVERAGED, class_groups, headline, scores


def test_scores_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(6, 400, p=[0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    predicted = np.where(rng.random(400) < 0.6, truth, rng.integers(0, 6, 400))
    found = scores(confusion_matrix(truth, predicted), [60, 50, 40, 30, 20, 10])
    recall = recall_score(truth, predicted, average=None)
    assert found["top1"] == pytest.approx(100 * (truth == predicted).mean())
    assert found["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(truth, predicted))
    assert found["recall"] == pytest.approx(100 * recall)
    assert found["geometric_mean"] == pytest.approx(100 * np.prod(recall) ** (1 / 6))
    assert found["many"] == pytest.approx(100 * recall[:2].mean())
    assert found["medium"] == pytest.approx(100 * recall[2:4].mean())
    assert found["few"] == pytest.approx(100 * recall[4:].mean())


def test_a_class_never_recalled_does_not_make_the_geometric_mean_zero() -> None:
    table = np.array([[9, 1], [10, 0]])
    assert scores(table, [5, 1])["geometric_mean"] == pytest.approx(100 * (0.9 / 200) ** 0.5)


def test_a_class_without_test_images_counts_nowhere() -> None:
    found = scores(np.array([[8, 2, 0], [0, 0, 0], [0, 5, 5]]), [9, 5, 1])
    assert found["recall"] == [80.0, None, 50.0]
    assert found["balanced_accuracy"] == pytest.approx(65.0)
    assert found["medium"] is None


def test_groups_follow_the_labeled_counts_not_the_class_index() -> None:
    assert class_groups([1, 50, 7, 3, 20, 9, 2]) == {"many": [1, 4], "medium": [5, 2, 3], "few": [6, 0]}
    assert class_groups([3, 9]) == {"many": [1], "medium": [], "few": [0]}


def test_add_pairs_counts_only_what_is_counted() -> None:
    table = torch.zeros(3, 3, dtype=torch.int64)
    truth, predicted = torch.tensor([0, 0, 2, -1]), torch.tensor([0, 1, 2, 2])
    add_pairs(table, truth, predicted, torch.tensor([True, True, True, False]))
    assert table.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_interval_follows_the_pseudo_labels_by_id_and_leaves_labeled_copies_out() -> None:
    interval = Interval(torch.tensor([0, 1, 1, -1, 2]), 3)
    ids = torch.tensor([0, 1, 2, 3, 4])
    label, mask = torch.tensor([0, 2, 1, 0, 2]), torch.tensor([True, True, True, True, False])

    def add(total: float, rows: int, pending: dict[str, torch.Tensor]) -> None:
        terms, stats = {"total": torch.tensor(total)}, {"mask": torch.tensor(total / 10)}
        interval.add(StepReport(terms, stats, {name: tensor[:rows] for name, tensor in pending.items()}), ids[:rows])

    add(2.0, 5, {"pseudo_label": label, "mask": mask})
    add(4.0, 1, {"pseudo_label": label, "mask": mask})
    interval.steps = 2
    terms, stats, fate = interval.read()
    assert terms == {"total": 3.0}
    assert stats == {"mask": pytest.approx(0.3)}
    assert fate == {
        "used_fraction": 5 / 6,
        "seen": [2, 2, 1],
        "used": [2, 2, 0],
        "correct": [2, 1, 0],
        "predicted": [2, 1, 1],
    }
    interval.reset()
    add(1.0, 0, {})
    interval.steps = 1
    terms, stats, fate = interval.read()
    assert terms == {"total": 1.0}
    assert fate is None


def test_the_headline_is_the_mean_of_the_last_evaluations() -> None:
    assert headline([100.0, *map(float, range(AVERAGED))]) == (AVERAGED - 1) / 2
    assert headline([1.0, None, 3.0, float("nan")]) == 2.0
    assert headline([None, float("nan")]) is headline([]) is None
