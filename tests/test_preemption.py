"""A run that is asked to end saves at the end of a step, says so with its exit code, and goes on as if never asked."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from semi_fast.cli import main
from semi_fast.loop import preemption
from semi_fast.loop.preemption import Preemption
from semi_fast.train import run

from .conftest import PATIENCE
from .tiny import ARGUMENTS, config

STEPS = 400
TRAIN = [sys.executable, "-m", "semi_fast.train"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "semi_fast.train"]
FLAGS = [f"--optim.steps={STEPS}", "--eval.every=100", "--log.every=7"]


@pytest.fixture
def started(digits: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts runs in groups of their own, and ends what is left of them."""
    processes: list[subprocess.Popen[str]] = []

    def start(launch: list[str], run_dir: Path, *flags: str) -> subprocess.Popen[str]:
        words = [*launch, *ARGUMENTS, f"--data.path={digits}", f"--run_dir={run_dir}", *FLAGS, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(words, text=True, start_new_session=True, **pipes))  # type: ignore[call-overload]
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_steps(run_dir: Path, steps: int) -> None:
    """Until the metrics tell of so many steps."""
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if metrics.exists() and any(json.loads(line)["step"] >= steps for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.05)
    raise AssertionError("the run did not come so far")


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-9:]) for path in (run_dir / "checkpoints").glob("step_*"))


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step_{STEPS:09d}" / "state.safetensors")


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(config(digits, run_dir, *FLAGS))
    return run_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_75_and_the_run_goes_on_bit_for_bit(
    number: signal.Signals,
    whole: Path,
    digits: Path,
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
) -> None:
    run_dir = tmp_path / "my run"
    process = started(TRAIN, run_dir)
    wait_for_steps(run_dir, 7)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    (step,) = saved(run_dir)
    assert 7 <= step < STEPS
    said, _, command = errors.strip().partition("; go on with: ")
    assert said == f"semi-fast: {number.name}: saved after step {step}"
    status = json.loads((run_dir / "status.json").read_text())
    assert status["exit_code"] == 75
    program, *words = shlex.split(command)
    assert program == "semi-fast"
    assert main(words) == 0, "as it is printed"
    ours, theirs = state(whole), state(run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 0


def test_one_process_that_is_asked_stops_all_at_the_same_step(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    launcher = started(LAUNCH, run_dir)
    wait_for_steps(run_dir, 7)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)  # whichever rank it is
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0  # a launcher turns every code into 1
    (step,) = saved(run_dir)
    assert errors.count(f"SIGTERM: saved after step {step}") >= 2, errors
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 75


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_launcher_leaves_no_process_behind(
    number: signal.Signals, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    run_dir = tmp_path / "run"
    launcher = started(LAUNCH, run_dir)
    wait_for_steps(run_dir, 7)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    gone, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert alive == []
    assert len(gone) >= 2
    assert len(saved(run_dir)) == 1
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 75


def test_a_lost_process_ends_the_other(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    run_dir = tmp_path / "run"
    launcher = started(LAUNCH, run_dir)
    wait_for_steps(run_dir, 7)
    workers = psutil.Process(launcher.pid).children()
    workers[0].kill()
    launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0
    assert psutil.wait_procs(workers, timeout=PATIENCE)[1] == []


def test_sigusr1_asks_too_and_nohup_keeps_sighup_from_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption(60) as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.check(3) is None
            signal.raise_signal(signal.SIGUSR1)
            assert asked.check(3) is signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "SAME_SECONDS", float("inf"))
    with Preemption(60) as asked:
        for _ in range(2):  # as a launcher passes on what the terminal has sent
            signal.raise_signal(signal.SIGINT)
        assert asked.check(3) is signal.SIGINT
        monkeypatch.setattr(preemption, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "SIGNALS", preemption.SIGNALS[:-1])  # SIGHUP, which nohup may have had ignored
    before = [signal.getsignal(one) for one in preemption.SIGNALS]
    with Preemption(60):
        assert [signal.getsignal(one) for one in preemption.SIGNALS] != before
    assert [signal.getsignal(one) for one in preemption.SIGNALS] == before
