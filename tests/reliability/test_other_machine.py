"""A run that goes on elsewhere says what is not as it was, when it does and in what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from semi_fast import train
from semi_fast.cli import main
from semi_fast.rundir import runlog
from semi_fast.train import guarded, run
from tests.libraries import needs
from tests.tiny import config

from .test_saved_entries import write_meta

FLAGS = ("--method.name=supervised", "--checkpoint.every=3", "--checkpoint.keep=9")
HERE = runlog.environment


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page takes longer than the run."""
    monkeypatch.setattr(train, "write_report", lambda run_dirs, page: page)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda run_dirs, page: page)
        run(config(digits, run_dir, *FLAGS))
    return run_dir


def resumed_at(step: int, digits: Path, run_dir: Path, **other: Any) -> None:
    """Go on from there, in an environment that is other in these entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "environment", lambda *given: HERE(*given) | other)
        run(config(digits, run_dir, *FLAGS, resume=str(run_dir / "checkpoints" / f"step_{step:09d}")))


def marks(run_dir: Path) -> tuple[bool, list[str]]:
    """What the summary says, and env.json too."""
    said = [json.loads((run_dir / name).read_text()) for name in ("summary.json", "env.json")]
    found = [(one["bit_exact"], one["changed_on_resume"]) for one in said]
    assert found[0] == found[1]
    return found[0]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_every_decisive_entry_is_named(
    whole: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = HERE(train.torch.device("cpu"), "fp32", 1, 10)
    others: dict[str, Any] = {
        "device": "cuda",
        "processor": "NVIDIA H200",
        "commit": "another",
        "operations": "Triton kernels",
        "processes": 2,
        "threads": 64,
        "versions": here["versions"] | {"torch": "1.0", "numpy": "1.0"},
    }
    assert others.keys() == set(runlog.DECISIVE)
    versions = here["versions"]
    for key, value in others.items():
        run_dir = tmp_path / key / "run"
        shutil.copytree(whole, run_dir)
        resumed_at(9, digits, run_dir, **{key: value})
        named = [f"{key} was {here[key]}, is {value}"]
        if key == "versions":
            named = [f"{one} was {versions[one]}, is 1.0" for one in ("numpy", "torch")]
        line = f"warning: {', '.join(named)}: goes on equal but for rounding, not bit for bit"
        assert warnings(capsys) == [line]
        assert marks(run_dir) == (False, [f"after step 9: {one}" for one in named])


def test_what_decides_nothing_is_not(
    whole: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    assert marks(run_dir) == (True, [])
    resumed_at(6, digits, run_dir, command=["another"], hardware="8 cores", platform="another", precision="another")
    assert warnings(capsys) == []
    assert marks(run_dir) == (True, [])


def test_a_change_is_remembered_by_the_checkpoints_after_it_alone(
    whole: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    threads = HERE(train.torch.device("cpu"), "fp32", 1, 10)["threads"]
    there, back = f"threads was {threads}, is 64", f"threads was 64, is {threads}"
    resumed_at(3, digits, run_dir, threads=64)
    resumed_at(6, digits, run_dir, threads=64)
    assert marks(run_dir) == (False, [f"after step 3: {there}"])
    resumed_at(9, digits, run_dir)
    assert marks(run_dir) == (False, [f"after step 3: {there}", f"after step 9: {back}"])
    assert len(warnings(capsys)) == 2
    resumed_at(3, digits, run_dir)
    assert marks(run_dir) == (True, []), "that checkpoint was made before anything was other"
    assert warnings(capsys) == []


def test_another_level_is_named_too(
    whole: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    path = run_dir / "checkpoints" / "step_000000006"
    meta = json.loads((path / "meta.json").read_text())
    write_meta(path, meta | {"level": "compile: forward and loss are compiled"})
    resumed_at(6, digits, run_dir)
    named = f"engine.level was compile: forward and loss are compiled, is {meta['level']}"
    assert warnings(capsys) == [f"warning: {named}: goes on equal but for rounding, not bit for bit"]
    assert marks(run_dir) == (False, [f"after step 6: {named}"])


def test_the_environments_before_are_a_flat_list_with_the_newest_last(
    whole: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for step, name in ((3, "second"), (6, "third"), (9, "fourth")):
        resumed_at(step, digits, run_dir, commit=name)
    found = json.loads((run_dir / "env.json").read_text())
    first = json.loads((whole / "env.json").read_text())
    assert found["commit"] == "fourth"
    before = found["before_resume"]
    assert [one["commit"] for one in before] == [first["commit"], "second", "third"]
    assert before[0] == first
    assert not any("before_resume" in one for one in before)


def test_on_a_gpu_its_libraries_and_driver_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (me@here)\n"
    (tmp_path / "version").write_text(told)
    monkeypatch.setattr(runlog, "DRIVER", tmp_path / "version")
    on_cpu, on_gpu = (runlog.versions(train.torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_gpu.keys() - on_cpu.keys() == {"cuda", "cudnn", "driver"}
    assert on_gpu["driver"] == "570.124.06"


def test_lossy_pixels_are_other_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The arrays of a data set and its JPEGs have the same digest of the data."""
    needs("dali")
    formats = ["--formats", "resident,dali", "--image-format", "jpeg", "--quality", "20"]
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), *formats]) == 0
    flags, run_dir = (*FLAGS, "--optim.steps=4", "--data.threads=1"), tmp_path / "run"
    run(config(tmp_path / "data", run_dir, *flags, "--data.source=dali"))
    assert guarded(config(tmp_path / "data", run_dir, *flags, "--data.source=resident", resume="auto")) == 2
    assert "pixels_sha256 is" in capsys.readouterr().err
    run(config(tmp_path / "data", run_dir, *flags, "--data.source=dali", resume="auto"))
