"""Trackers: TensorBoard's events read back; and one that cannot begin, or fails, takes nothing from the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import tracking
from accelerate.tracking import WandBTracker
from accelerate.utils import LoggerType

from semi_fast.cli import main
from semi_fast.rundir import trackers

from .tiny import ARGUMENTS


class OfTheTracker(Exception):
    """Of a kind that nobody else knows."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """W&B looks installed, begins, and does nothing; a test may change that."""
    monkeypatch.setattr(trackers, "is_installed", lambda name: name in ("tensorboard", "wandb"))
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    for name in ("start", "store_init_configuration", "log", "finish"):
        monkeypatch.setattr(WandBTracker, name, lambda self, *args, **kwargs: None)
    return monkeypatch


def fails(self: WandBTracker, *args: object, **kwargs: object) -> None:
    raise OfTheTracker("no account:\nlog in")


def train(data: Path, run_dir: Path, *flags: str) -> int:
    return main(["train", *ARGUMENTS, f"--data.path={data}", f"--run_dir={run_dir}", *flags])


def test_the_names_are_those_of_accelerate() -> None:
    assert {*trackers.NAMES, "all"} == set(LoggerType.list())


def test_a_folder_of_its_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "swanlab").mkdir()
    assert (trackers.is_installed("swanlab"), trackers.is_installed("tensorboard")) == (False, True)


def test_a_version_that_accelerate_does_not_take_is_named(
    digits: Path, tmp_path: Path, wandb: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    assert train(digits, tmp_path / "run", "--log.track=[wandb]") == 2
    assert "log.track: accelerate does not take wandb as it is installed" in capsys.readouterr().err


def test_the_events_of_tensorboard_are_the_metrics(digits: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(digits, tmp_path / "run", "--log.track=[tensorboard]") == 0
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "semi_fast")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for kind, tag, value in (
        ("train", "total", lambda line: line["terms"]["total"]),
        ("train", "lr", lambda line: line["lr"]),
        ("eval", "test.top1", lambda line: line["heads"][line["predicts"]]["top1"]),
    ):
        told = [(event.step, event.value) for event in events.Scalars(tag)]
        written = [(line["step"], value(line)) for line in lines if line["kind"] == kind]
        assert len(told) == 3
        assert told == [(step, pytest.approx(number, rel=1e-6)) for step, number in written]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("all", "log.track must name each tracker, as installed ones may have no account (here: tensorboard, wandb)"),
        ("tensorbord", "log.track must be of "),
        ("wandb,mlflow", "log.track names mlflow, which is not installed: pip install mlflow, or leave it out"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused_first(
    names: str, words: str, tmp_path: Path, wandb: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "no data yet", tmp_path / "run", f"--log.track=[{names}]") == 2
    assert capsys.readouterr().err.startswith(f"semi-fast: {words}")
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_does_not_begin_is_named_and_the_directory_stays_free(
    digits: Path, tmp_path: Path, wandb: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setattr(WandBTracker, "start", fails)
    wandb.setattr(WandBTracker, "finish", fails)  # as of one that has not begun
    run_dir = tmp_path / "run"
    assert train(digits, run_dir, "--log.track=[wandb]") == 2
    assert capsys.readouterr().err == (
        "semi-fast: log.track: wandb does not begin: no account: log in; mend that, or leave it out\n"
    )
    assert {path.name for path in run_dir.iterdir()} == {"run.lock", "status.json", "trackers"}
    assert train(digits, run_dir, "--optim.steps=4") == 0


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(
    digits: Path, tmp_path: Path, wandb: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.setattr(WandBTracker, "log", fails)
    assert train(digits, tmp_path / "run", "--log.track=[wandb]") == 0
    warning = "warning: log.track: wandb failed (no account: log in): it gets no more"
    assert capsys.readouterr().out.splitlines().count(warning) == 1
    assert (tmp_path / "run" / "summary.json").exists()
