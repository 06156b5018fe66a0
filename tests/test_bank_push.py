"""The bank against the rule it stands for: one row after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.methods import memory_bank


class OneByOne:
    """The sequential rule, in plain Python: a list of (confidence, number, feature) per class."""

    def __init__(self, classes: int, slots: int):
        self.rows: list[list[tuple[float, int, float]]] = [[] for _ in range(classes)]
        self.slots = slots

    def push(
        self, feature: float, label: int, confidence: float, masked_in: bool, number: int, oldest_leaves: bool = False
    ) -> None:
        rows = self.rows[label]
        if not masked_in or not confidence > 0:
            return
        if len(rows) == self.slots and oldest_leaves:
            rows.remove(min(rows, key=lambda row: row[1]))
        elif len(rows) == self.slots:
            victim = min(rows, key=lambda row: (row[0], -row[1]))  # lowest confidence, of equals the latest
            if not confidence > victim[0]:
                return
            rows.remove(victim)
        rows.append((confidence, number, feature))

    def decay(self, factor: float) -> None:
        self.rows = [[(float(np.float32(c) * np.float32(factor)), n, f) for c, n, f in rows] for rows in self.rows]


def content(bank: dict[str, torch.Tensor]) -> list[list[tuple[float, int, float]]]:
    features, confidences, numbers = (bank[f"bank.{k}"] for k in ("features", "confidences", "inserted"))
    return [
        sorted((c, n, f) for c, n, f in zip(*(x.tolist() for x in row), strict=True) if n >= 0)
        for row in zip(confidences, numbers, features[..., 0], strict=True)
    ]


# Few distinct confidences, so that ties are the rule; saturated ones, zero and NaN among them.
CONFIDENCES = st.sampled_from([0.0, 0.7, 0.75, 0.9, 0.99, 1.0, float("nan")])
OFFERS = st.lists(st.tuples(st.integers(0, 2), CONFIDENCES, st.booleans()), min_size=6, max_size=6)


@settings(max_examples=400)
@given(st.lists(OFFERS, min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_equals_the_sequential_rule(
    steps: list[list[tuple[int, float, bool]]], slots: int, decay_every: int, oldest_leaves: bool
) -> None:
    bank = memory_bank.empty(3, slots, 2, device=torch.device("cpu"), dtype=torch.float32)
    model = OneByOne(3, slots)
    for step, offers in enumerate(steps):
        labels, confidences, mask = (torch.tensor(list(column)) for column in zip(*offers, strict=True))
        numbers = step * len(offers) + np.arange(len(offers))
        features = torch.from_numpy(numbers).float().unsqueeze(1).repeat(1, 2) + 0.5
        memory_bank.push(bank, features, labels, confidences, mask, torch.tensor(step), oldest_leaves=oldest_leaves)
        for i, (label, confidence, masked_in) in enumerate(offers):
            row = float(numbers[i]) + 0.5, label, float(np.float32(confidence)), masked_in, int(numbers[i])
            model.push(*row, oldest_leaves)
        if (step + 1) % decay_every == 0:
            memory_bank.decay(bank, torch.tensor(0.9))
            model.decay(0.9)
    assert content(bank) == [sorted(rows) for rows in model.rows]
    assert torch.equal(bank["bank.features"][..., 0], bank["bank.features"][..., 1]), "a slot holds one row"
    assert torch.equal(bank["bank.sums"], bank["bank.features"].double().sum(1)), "small whole halves add up exactly"


@pytest.mark.parametrize("classes", [2, 10, 127])
def test_many_rows_of_many_classes(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    bank, model = (
        memory_bank.empty(classes, 8, 3, device=torch.device("cpu"), dtype=torch.float32),
        OneByOne(classes, 8),
    )
    for step in range(30):
        labels = torch.randint(0, classes, (128,), generator=generator)
        confidences = (0.7 + 0.3 * torch.rand(128, generator=generator)).mul(64).round().div(64)
        mask = torch.rand(128, generator=generator) < 0.8
        features = (step * 128 + torch.arange(128.0)).unsqueeze(1).expand(-1, 3)
        memory_bank.push(bank, features, labels, confidences, mask, torch.tensor(step))
        for i in range(128):
            model.push(float(features[i, 0]), int(labels[i]), float(confidences[i]), bool(mask[i]), step * 128 + i)
    assert content(bank) == [sorted(rows) for rows in model.rows]


def test_prototypes_are_means_of_filled_slots() -> None:
    bank = memory_bank.empty(3, 4, 2, device=torch.device("cpu"), dtype=torch.float32)
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]])
    memory_bank.push(bank, features, torch.tensor([0, 0, 2]), torch.ones(3), torch.ones(3).bool(), torch.tensor(0))
    means, valid = memory_bank.prototypes(bank)
    assert means.tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, 5.0]]
    assert valid.tolist() == [True, False, True]
