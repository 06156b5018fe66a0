"""Several runs at a time: what they leave, what is taken as it is, and how a failure and an interruption end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from semi_fast.cli import main
from semi_fast.commands import sweep as module
from semi_fast.commands.reproduce import finished
from semi_fast.commands.sweep import devices
from semi_fast.disk import locked
from semi_fast.schema.arguments import parse_config
from semi_fast.schema.yaml_file import dump

from .conftest import PATIENCE
from .tiny import FILE


@pytest.fixture
def files(digits: Path, tmp_path: Path) -> list[str]:
    """Two small configurations."""
    paths = []
    for name in ("supervised", "fixmatch"):
        tree = yaml.safe_load(FILE.read_text()) | {"data": {"path": str(digits)}, "eval": {"every": 2}}
        tree["method"]["name"], tree["optim"]["steps"] = name, 4
        del tree["device"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        paths.append(str(path))
    return paths


FLAGS = ["--device=cpu"]


def test_every_file_with_every_seed_and_what_is_finished_stays(
    files: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["sweep", files[0], "--seeds", "0,1", "--out", str(out), "--per-device", "2", *FLAGS]
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "2 runs, 2 at a time" in said
    assert "nothing to resume" not in (out / "supervised" / "seed_0.log").read_text(), "nobody asked for that"
    runs = [out / "supervised" / f"seed_{seed}" for seed in (0, 1)]
    for run in runs:
        assert json.loads((run / "summary.json").read_text())["seed"] == int(run.name[-1])
        assert "report: " in run.with_suffix(".log").read_text()
    assert (out / "report.html").is_file()
    written = (runs[0] / "summary.json").stat().st_mtime_ns
    assert main(words) == 0
    assert "0 runs" in capfd.readouterr().out
    assert (runs[0] / "summary.json").stat().st_mtime_ns == written


def test_a_run_that_fails_is_named_and_the_others_go_on(
    files: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "supervised" / "seed_0").mkdir(parents=True)
    (out / "supervised" / "seed_0" / "mine.txt").write_text("not a run")
    assert module.run(files=files, seeds="0", out=out, keys=FLAGS) == 1
    said = capfd.readouterr().out
    assert "supervised/seed_0: FAILED with code 2" in said
    assert "run_dir must be new, empty or a run" in said
    assert (out / "fixmatch" / "seed_0" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed=3"], "--seed is set by sweep; use --seeds"),
        (["--optim.lr=-1"], "optim.lr must lie in .1e-30, 1e.30.; got -1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    files: list[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module.run(files=files, seeds="0", out=tmp_path / "out", keys=[*FLAGS, *flags])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="must have different names"):
        module.run(files=[files[0], files[0]], seeds="0", out=tmp_path / "out", keys=FLAGS)
    with pytest.raises(ValueError, match="--per-device must be at least 1; got 0"):
        module.run(files=files, seeds="0", out=tmp_path / "out", per_device=0, keys=FLAGS)


def test_one_sweep_at_a_time_has_the_directory(
    files: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And a page that is none of ours is refused before it, not after all runs."""
    out = tmp_path / "out"
    words = ["sweep", *files, "--seeds", "0", "--out", str(out), *FLAGS]
    with locked(out / "sweep.lock", "--out"):
        assert main(words) == 2
    said = f"--out {out} is in use by process {os.getpid()} on {socket.gethostname()}; wait for it, or choose another"
    assert capfd.readouterr().err == f"semi-fast: {said}\n"
    (out / "report.html").write_text("mine")
    assert main(words) == 2
    assert "a report replaces nothing but a report" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "sweep.lock"]


def test_a_flag_for_some_files_alone_and_a_place_that_moved_change_no_finished_run(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run is started with is what it is compared with when the sweep is repeated, from wherever."""
    flags = [*FLAGS, "--method.fixmatch.threshold=0.2"]
    cells = list(module.cells_of(files, seeds=[0], out=Path("out"), flags=flags))
    assert [cell.config for cell in cells] == [parse_config(cell.arguments) for cell in cells]
    assert [cell.config.method.fixmatch.threshold for cell in cells] == [0.3, 0.2]
    run_dir = tmp_path / "moved" / "supervised" / "seed_0"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump(cells[0].config))
    (run_dir / "summary.json").write_text('{"status": "finished", "split_sha256": "0"}')
    moved, _ = module.cells_of(files, seeds=[0], out=tmp_path / "moved", flags=flags)
    assert finished(moved.config, "0") is not None


def test_every_gpu_is_used(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [flag for flag in FLAGS if flag != "--device=cpu"]
    cells = list(module.cells_of(files, seeds=[0], out=tmp_path, flags=flags))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices(cells) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert devices(cells) == ["4", "6", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert devices(cells) == [None]
    assert devices(list(module.cells_of(files, seeds=[0], out=tmp_path, flags=FLAGS))) == [None]


def test_an_interruption_ends_the_runs(files: list[str], tmp_path: Path) -> None:
    long = ["--optim.steps=100000", "--eval.every=1000"]
    words = ["sweep", files[0], "--seeds", "0", "--out", str(tmp_path / "out"), *FLAGS, *long]
    process = subprocess.Popen([sys.executable, "-m", "semi_fast.cli", *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    config = tmp_path / "out" / "supervised" / "seed_0" / "config.yaml"
    deadline = time.monotonic() + PATIENCE
    while not config.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    lock = tmp_path / "out" / "supervised" / "seed_0" / "run.lock"
    runner = int(lock.read_text().split()[1]) if lock.exists() else None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    status = json.loads((config.parent / "status.json").read_text())
    assert status["exit_code"] == 75, "the run was told once, and saved"
    assert "started" in said
    if runner is not None:
        with pytest.raises(ProcessLookupError):
            os.kill(runner, 0)
