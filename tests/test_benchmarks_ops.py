"""The plain code that benchmarks compare with does what it stands for, and the benchmark of the operations runs."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import measure, ops, view_cases
from benchmarks.case import Case, Goal
from benchmarks.measure import DispatchCounter, Spread, Work
from benchmarks.reference import pillow_views, semi_step
from semi_fast.methods import memory_bank
from semi_fast.ops.draw_views import draw_views
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.pseudo_label import pseudo_label
from semi_fast.ops.rand_augment import rand_augment

CPU = torch.device("cpu")


def content(features: torch.Tensor, confidences: torch.Tensor) -> list[list[tuple[float, ...]]]:
    """Per class the filled slots as (confidence, *features), in order."""
    rows = torch.cat([confidences.unsqueeze(2), features], 2)
    return [sorted(tuple(row) for row in one.tolist() if row[0] > 0) for one in rows]


@pytest.mark.parametrize(("classes", "slots"), [(1, 5), (3, 8), (10, 16)])
def test_the_corrected_loop_keeps_the_rows_of_bank_push(classes: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    state = memory_bank.empty(classes, slots, 3, device=CPU, dtype=torch.float32)
    loop = semi_step.empty_bank(classes, slots, 3, CPU)
    for step in range(12):
        labels = torch.randint(classes, (32,), generator=generator)
        confidences = torch.randint(0, 64, (32,), generator=generator) / 64  # ties are the rule, and zeros
        features = torch.randn(32, 3, generator=generator)
        mask = torch.rand(32, generator=generator) < 0.8
        memory_bank.push(state, features, labels, confidences, mask, torch.tensor(step))
        semi_step.push(loop, features, labels, confidences, mask, semi_step.insert_lowest)
        kept = content(state["bank.features"], state["bank.confidences"])
        assert kept == content(loop.features, loop.confidences)
    assert sum(map(len, kept)) == classes * slots


@pytest.mark.parametrize(("selected", "entering"), [(128, 128), (128, 0), (40, 40), (100, 30)])
def test_the_loop_makes_the_calls_of_the_released_code(selected: int, entering: int) -> None:
    bank = semi_step.empty_bank(10, 128, 8, CPU)
    bank.confidences.fill_(0.5)
    row = torch.arange(128)
    confidences = torch.where(row < entering, 0.9, 0.1)
    features, labels, mask = torch.randn(128, 8), row % 10, row < selected
    with DispatchCounter() as seen:
        semi_step.push(bank, features, labels, confidences, mask, semi_step.insert_official)
    assert sum(map(len, bank.accepted)) == entering
    assert seen.dispatched == pytest.approx(8 + 10 * selected + 27 * entering, rel=0.01)
    assert seen.waits == 1 + 2 * selected + 9 * entering + 3


def test_the_released_eviction_leaves_zero_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(8):
        bank = semi_step.empty_bank(1, 128, 4, CPU)
        features = torch.ones(128, 4)
        confidences = 0.7 + 0.3 * torch.rand(128, generator=generator)
        labels, mask = torch.zeros(128, dtype=torch.int64), torch.ones(128, dtype=torch.bool)
        semi_step.push(bank, features, labels, confidences, mask, semi_step.insert_official)
        assert len(bank.accepted[0]) == 128
        shares.append(float((bank.features == 0).all(2).float().mean()))
    assert np.mean(shares) == pytest.approx(0.648, abs=0.03)


def test_the_released_decay_spares_what_is_new_as_often_as_it_occurs() -> None:
    bank = semi_step.empty_bank(1, 4, 1, CPU)
    bank.confidences[0] = torch.tensor([1.0, 0.9, 0.9, 0.8])
    bank.features[0, :, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    bank.accepted[0] = [torch.tensor(0.9), torch.tensor(0.8)]
    semi_step.decay(bank)
    torch.testing.assert_close(bank.confidences[0], torch.tensor([0.99, 0.9, 0.891, 0.8]))
    assert bank.features[0, :, 0].tolist() == [1.0, 3.0, 2.0, 4.0]
    assert bank.accepted == [[]]


def test_the_plain_labels_and_losses_are_those_of_the_operations() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, balanced_logits = (4 * torch.randn(16, 5, generator=generator) for _ in range(2))
    queries, adjustment = torch.randn(16, 8, generator=generator), torch.randn(5, generator=generator)
    bank = semi_step.LoopBank(torch.randn(5, 4, 8, generator=generator), torch.ones(5, 4))
    centers, mixing = semi_step.prototypes(bank), torch.full((5,), 0.3)
    plain = semi_step.pseudo_labels(logits, balanced_logits, queries, centers, mixing, adjustment.double())
    inputs = logits, balanced_logits, queries, centers, torch.ones(5).bool(), mixing, adjustment
    options = {"threshold": 0.7, "prototype_temperature": 0.1, "renormalize": False}
    ours = pseudo_label(*inputs, torch.tensor(0.75), **options)
    for theirs, field in zip(plain, ours, strict=False):
        torch.testing.assert_close(theirs, field)
    counts = torch.zeros(5, dtype=torch.int64)
    semi_step.count_classes(counts, plain.label, plain.mask)
    assert torch.equal(counts, ours.counts)

    strong, coefficient = torch.randn(32, 5, generator=generator), torch.where(plain.mask, plain.hardness, 0.0)
    theirs = semi_step.masked_cross_entropy(strong, plain.label, coefficient)
    torch.testing.assert_close(theirs, masked_cross_entropy(strong, plain.label, coefficient))
    features, center = torch.randn(32, 8, generator=generator), torch.full((8,), 0.1)
    theirs, moved = semi_step.embedding_align(queries, features, center, coefficient)
    temperatures = {"temperature": 0.09, "teacher_temperature": 0.018}
    loss, target = embedding_align(queries, features, center, coefficient, **temperatures)
    torch.testing.assert_close(theirs, loss)
    torch.testing.assert_close(moved, 0.9 * center + 0.1 * target.mean(0))


def test_the_plain_views_are_those_of_rand_augment(natural_images: np.ndarray) -> None:
    ids = torch.arange(48)
    sources, parameters = draw_views(
        ids,
        torch.zeros_like(ids),
        labeled=16,
        unlabeled=32,
        strong_views=2,
        seed=3,
        resolution=(32, 32),
        flip=True,
        pad=4,
        cutout=16,
        operations=2,
    )
    mean, std = (torch.tensor(values) for values in (view_cases.MEAN, view_cases.STD))
    images = torch.from_numpy(natural_images[:48])
    options = {"pad": 4, "cutout": 16, "mean": mean, "std": std, "dtype": torch.float32}
    ours = rand_augment(images, sources, parameters, **options)
    pillow = [Image.fromarray(natural_images[i]) for i in sources.tolist()]
    plain = pillow_views.render_all(
        pillow, view_cases.as_views(parameters), pad=4, cutout=16, mean=view_cases.MEAN, std=view_cases.STD
    )
    torch.testing.assert_close(plain, ours, rtol=0, atol=2e-6)  # a pixel's step is 0.015


@pytest.mark.parametrize("seed", range(3))
def test_drawn_plain_views_lie_in_their_ranges(seed: int) -> None:
    view = pillow_views.draw_strong(Random(seed), 32, 4, 16)
    assert all(0 <= at <= 8 for at in view.crop)
    assert view.cutout is not None
    assert all(0 <= at < 24 for at in view.cutout)
    assert all(name in pillow_views.NAMES and 1 <= level <= 9 for name, level, _ in view.operations)


def test_waits_are_seen() -> None:
    x = torch.arange(4.0)
    for call, expected in (
        (lambda: x.sum().item(), 1),
        (lambda: x[x > 1], 1),
        (lambda: (x > 1).nonzero(), 1),
        (lambda: x[torch.tensor([0, 2])], 0),
        (lambda: torch.where(x > 1, x, 0.0), 0),
    ):
        assert measure.count(Work([call]), CPU).waits == expected


@pytest.mark.parametrize(
    ("low", "high", "steady", "verdict"),
    [(8.1, 9, 1, "met"), (7, 7.9, 1, "missed"), (7.9, 8.1, 1, "undecided"), (8.1, 9, 1.2, "inconclusive")],
)
def test_a_goal_is_judged_by_the_whole_interval(low: float, high: float, steady: float, verdict: str) -> None:
    found = {"r": Spread(8, low, high), "same_over_same_ratio": Spread(steady, steady, steady)}
    goals = Goal("cuda", "r", 1, True), Goal("cpu", "r", 8.0, True)
    assert ops.judge(goals, found, CPU) == ("r >= 8", verdict)
    upper = Goal("cpu", "r", 8.0, False)
    turned = {"met": "missed", "missed": "met"}
    assert ops.judge([upper], found, CPU) == ("r <= 8", turned.get(verdict, verdict))


def test_the_benchmark_writes_rows_that_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.csv"
    ops.main(["--only", "bank_push", "--repeats", "2", "--device", "cpu", "--out", str(out)])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        low, ratio, high = (float(row[f"loop_over_ours_ratio{part}"]) for part in ("_low", "", "_high"))
        assert 0 < low <= ratio <= high
        assert float(row["loop_us"]) > 0
        assert float(row["reference_us"]) > 0
        assert row["kernel_us"] == "", "kernels need a GPU"
        assert float(row["reference_waits_per_call"]) == 0
        assert float(row["loop_waits_per_call"]) > 200
        assert row["n"] == "2"
        assert row["command"] == "python -m benchmarks.ops --only bank_push --repeats 2 --device cpu"
        assert all(row[name] for name in ("date", "commit", "hardware", "threads", "torch", "python", "clock"))
    assert [bool(row["goal"]) for row in rows] == [True, True, False] * 2
    assert "loop_over_ours_ratio >= 8" in capsys.readouterr().out


def test_a_case_that_fails_is_a_row_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, first = tmp_path / "ops.csv", ops.CASES["draw_views"](CPU)[0]

    def failing(*_: object, **__: object) -> None:
        raise TypeError("no\ncompiler")

    def cases(device: torch.device) -> list[Case]:
        return [replace(first, work=lambda op: Work([failing])), first]

    monkeypatch.setitem(ops.CASES, "draw_views", cases)
    assert ops.main(["--only", "draw_views", "--repeats", "1", "--device", "cpu", "--out", str(out)]) == 1
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed: TypeError: no compiler", "measured"]
    assert float(rows[1]["reference_us"]) > 0
