"""`make gpu` and `make gpu-more`: what comes first, what a failure ends, and both run through at toy size."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
WEIGHTIEST_FIRST = {
    "gpu": ["kernels", "capture", "step", "reference", "resume"],
    "gpu-more": ["end_to_end", "packing", "ops", "resnet"],
}
FAKE = """#!/bin/sh
echo "$*" >>{calls}
case "$*" in *{fails}*) echo so it fails; exit 3;; esac
for word; do test "$before" != --out || : >"$word"; before=$word; done
"""
Make = Callable[..., CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make with everything that it writes in `tmp_path`."""

    def call(*words: str) -> CompletedProcess[str]:
        places = [f"OUT={tmp_path / 'out'}", f"WORK={tmp_path / 'work'}"]
        return subprocess.run(
            ["make", "--no-print-directory", *words, *places], cwd=ROOT, capture_output=True, text=True, check=False
        )

    return call


@pytest.fixture
def noted(make: Make, tmp_path: Path) -> Callable[..., tuple[CompletedProcess[str], list[str]]]:
    """make with a Python that fails where it is given certain words; (how it ended, what Python was called with)."""

    def call(target: str, *, fails: str = "nothing") -> tuple[CompletedProcess[str], list[str]]:
        calls, python = tmp_path / "calls", tmp_path / "python"
        python.write_text(FAKE.format(calls=calls, fails=fails))
        python.chmod(0o755)
        return make(target, f"PYTHON={python}"), calls.read_text().splitlines()

    return call


def ends(done: CompletedProcess[str]) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): exit (\d+) after", done.stdout, re.M))


def seconds_of(shown: str) -> list[int]:
    """Of what make would run: the machine's, and each step's own."""
    return [int(n) for n in re.findall(r"(?:timeout|limit=\$\(\()\s?(\d+)", shown)]


@pytest.mark.parametrize("target", WEIGHTIEST_FIRST)
def test_steps_come_in_their_order(noted: Callable, target: str) -> None:
    done, calls = noted(target)
    assert done.returncode == 0
    assert ends(done) == dict.fromkeys(WEIGHTIEST_FIRST[target], "0")
    assert list(ends(done)) == WEIGHTIEST_FIRST[target]
    assert "benchmarks.machine" in next(call for call in calls if "pip install" not in call)


def test_a_step_that_fails_ends_make_but_no_other_step(noted: Callable, tmp_path: Path) -> None:
    done, _ = noted("gpu", fails="benchmarks.step")
    assert done.returncode != 0
    assert ends(done) == dict.fromkeys(WEIGHTIEST_FIRST["gpu"], "0") | {"step": "3"}
    assert (tmp_path / "out" / "step.log").read_text() == "so it fails\n"
    assert "step: exit 3" in done.stdout


def test_a_step_may_take_what_earlier_ones_left(noted: Callable, make: Make) -> None:
    _, *own = seconds_of(make("-n", "gpu").stdout)
    given = [int(limit) for limit in re.findall(r"after \d+ of (\d+) s$", noted("gpu")[0].stdout, re.M)]
    assert given[0] == own[0]
    assert all(own[i] < given[i] <= sum(own[: i + 1]) for i in range(1, len(own)))


def test_nothing_begins_on_a_machine_that_lacks_something(noted: Callable) -> None:
    done, calls = noted("gpu", fails="benchmarks.machine")
    assert done.returncode != 0
    assert "benchmarks.machine" in calls[-1]
    assert done.stdout == "so it fails\n"


def test_eight_minutes_are_enough(make: Make) -> None:
    shown = make("-n", "gpu").stdout
    seconds = seconds_of(shown)
    assert len(seconds) == 1 + len(WEIGHTIEST_FIRST["gpu"])
    assert sum(seconds) <= 480
    assert ".venv" not in shown


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("target", WEIGHTIEST_FIRST)
def test_it_runs_through_at_toy_size(make: Make, target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = make(target, "SMALL=1", "LIMIT=0", f"PYTHON={sys.executable}")
    logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(out.glob("*.log")))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert list(ends(done)) == WEIGHTIEST_FIRST[target]
    assert len(list(out.iterdir())) <= 8, "a lent machine gives no more files back"
    if target == "gpu":
        assert {row["status"] for row in rows_of(out / "step.csv")} == {"measured", "a cpu has no CUDA graphs"}
        assert {row["trainer"] for row in rows_of(out / "reference.csv")} == {"ours", "reference"}
        assert "1 passed" in (out / "capture.log").read_text()
    else:
        assert [row["beside"] for row in rows_of(out / "packing.csv")] == ["1", "1"]
        assert rows_of(out / "end_to_end.csv")[-1]["kind"] == "summary"
        assert {row["status"] for row in rows_of(out / "ops.csv")} == {"measured"}
        assert rows_of(out / "resnet.csv")


def test_what_a_machine_lacks_is_named() -> None:
    assert machine.unmet(machine.requirements()) == []
    found = machine.unmet(["torch>=2", "numpy>=99", "no-such-package>=1"])
    assert found[0].startswith("numpy>=99 (installed: ")
    assert found[1:] == ["no-such-package>=1 (not installed)"]


def test_what_cannot_be_imported_is_named_with_its_own_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hollow.py").write_text("import gone_from_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine, "PROGRAMS", ("hollow",))
    assert machine.main(["--device", "cpu"]) == 1
    said = "missing: No module named 'gone_from_here', without which hollow cannot be imported\n"
    assert capsys.readouterr().out == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.main([]) == 1
    assert capsys.readouterr().out.startswith("missing: a GPU that torch can use")
    assert machine.main(["--device", "cpu"]) == 0
