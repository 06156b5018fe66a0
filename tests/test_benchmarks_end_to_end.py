"""Whole runs of both trainers: rows as they are made, parts that add up, and the minutes of the paper's run."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import Course, paper_minutes, reached, spreads
from benchmarks.reference.loop import ReferenceLoop
from benchmarks.trainers import OURS, REFERENCE, Seconds

from .tiny import ARGUMENTS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORDS = ["--thresholds", "1,99.5", *ARGUMENTS, "--optim.steps=6", "--eval.every=2"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of six steps with two seeds."""
    out = tmp_path_factory.mktemp("end_to_end") / "out.csv"
    end_to_end.main(["--data", str(digits), "--out", str(out), "--seeds", "0,3", *WORDS])
    return rows_of(out)


def test_both_take_turns_and_are_evaluated_alike(rows: list[dict[str, str]]) -> None:
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["seed"] for row in evaluations] == ["0"] * 6 + ["3"] * 6
    assert [row["step"] for row in evaluations] == ["2", "2", "4", "4", "6", "6"] * 2
    assert [row["trainer"] for row in evaluations[:6]] == [OURS, REFERENCE, REFERENCE, OURS, OURS, REFERENCE]
    assert all(0 < float(row["balanced_accuracy"]) <= 100 for row in evaluations)
    for row in rows:
        assert all(row[name] for name in ("date", "commit", "hardware", "clock", "split_sha256", "command", "steps"))


def test_the_parts_add_up(rows: list[dict[str, str]]) -> None:
    for row in rows:
        parts = [float(row[f"{part}_seconds"]) for part in ("start", "step", "evaluation")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(float(row["seconds"]), rel=1e-3, abs=2e-3)
        assert bool(row["loading_seconds"]) == (row["trainer"] == REFERENCE)
    for row in (row for row in rows if row["kind"] == "summary"):
        minutes = [float(row[f"paper_{part}_minutes"]) for part in ("step", "evaluation", "start")]
        assert minutes[0] == pytest.approx(float(row["seconds_per_step"]) * 250_000 / 60, rel=1e-3)
        assert sum(minutes) == pytest.approx(float(row["paper_minutes"]), rel=1e-3)


def test_the_summary_says_when_an_accuracy_was_reached(rows: list[dict[str, str]]) -> None:
    summaries = {row["trainer"]: row for row in rows if row["kind"] == "summary"}
    assert list(summaries) == [REFERENCE, OURS]
    for name, row in summaries.items():
        mine = [one for one in rows if one["kind"] == "evaluation" and one["trainer"] == name]
        assert (row["seed"], row["n"], row["seconds_to_99.5"]) == ("0 3", "6", "")
        first = sorted(float(one["seconds"]) for one in mine if one["step"] == "2")
        assert float(row["seconds_to_1"]) == pytest.approx(sum(first) / 2, rel=1e-3)
        last = [float(one["balanced_accuracy"]) for one in mine if one["step"] == "6"]
        assert float(row["balanced_accuracy"]) == pytest.approx(sum(last) / 2, abs=0.02)
    assert float(summaries[REFERENCE]["chunk_ratio"]) == 1
    assert float(summaries[OURS]["chunk_ratio"]) > 0
    assert summaries[OURS]["goal"] == "", "there is none for a CPU"


def test_a_run_that_ends_early_keeps_its_rows(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, out, kept = ReferenceLoop.evaluate, tmp_path / "out.csv", []

    def fails(loop: ReferenceLoop) -> dict[str, float]:
        if loop.done == 4:
            kept.extend(rows_of(out))  # what is on the disk when the process is killed
            raise KeyboardInterrupt
        return evaluate(loop)

    monkeypatch.setattr(ReferenceLoop, "evaluate", fails)
    with pytest.raises(KeyboardInterrupt):
        end_to_end.main(["--data", str(digits), "--out", str(out), *WORDS])
    assert [(row["trainer"], row["step"]) for row in kept] == [(OURS, "2"), (REFERENCE, "2")]


class Still:
    """A trainer that is never called."""

    def step(self) -> None: ...

    def evaluate(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...


def course(name: str, seconds: list[float], accuracies: list[float]) -> Course:
    """One whose chunks, of one step each, take so many seconds on the wall and twice as many of the CPU."""
    made = Course(name, 0, Still(), Seconds(60, 120))
    for n, (taken, found) in enumerate(zip(seconds, accuracies, strict=True)):
        made.chunks.append(Seconds(taken, 2 * taken))
        made.evaluations.append(Seconds(3, 6))
        made.at.append(Seconds(60 + sum(seconds[: n + 1]) + 3 * (n + 1), 0))
        made.scores.append({"top1": found, "balanced_accuracy": found})
    return made


def test_the_paper_takes_median_steps_and_evaluations_and_one_start() -> None:
    one = course(OURS, [0.006, 0.003, 0.001], [10, 70, 65])
    assert paper_minutes([one], CUDA) == pytest.approx((12.5, 25, 1))
    assert paper_minutes([one], CPU) == pytest.approx((25, 50, 2))
    ends = [{OURS: one, REFERENCE: course(REFERENCE, [0.012, 0.006, 0.003], [10, 20, 30])}]
    found = spreads(OURS, ends, CUDA)
    assert found["paper_minutes"].median == pytest.approx(38.5)
    assert found["chunk_ratio"] == pytest.approx((2, 2, 3))
    assert found["same_over_same_ratio"].median == pytest.approx(0.5)


def test_seconds_to_an_accuracy_are_those_to_the_first_evaluation_with_it() -> None:
    courses = [course(OURS, [1, 1, 1], [10, 70, 65]), course(OURS, [2, 2, 2], [10, 69, 71])]
    assert courses[0].seconds_to(65, CUDA) == 68
    assert courses[1].seconds_to(70, CUDA) == 75
    assert reached(courses, 70, CUDA) == "71.5"
    assert reached(courses, 70.5, CUDA) == "", "one seed did not reach it"


def test_one_chunk_gives_no_verdict() -> None:
    ends = [{name: course(name, [1.0], [10]) for name in (OURS, REFERENCE)}]
    found = spreads(OURS, ends, CUDA)
    assert end_to_end.ops.judge(end_to_end.GOALS, found, CUDA)[1] == "inconclusive"


def test_a_chunk_needs_a_step_beside_the_first(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(["--data", str(digits), "--out", str(tmp_path / "out.csv"), *WORDS, "--eval.every=1"])
