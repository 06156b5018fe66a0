"""Every fault of docs/faults.md has a test that exists; and the tests of those that belong to no other file."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from semi_fast import train
from semi_fast.cli import main
from semi_fast.prepared.manifest import load_manifest
from semi_fast.rundir import checkpoint
from semi_fast.sealed_json import read_json
from semi_fast.train import guarded, run
from tests.conftest import PATIENCE
from tests.synthetic_data import write_prepared
from tests.test_engine import records, state
from tests.tiny import ARGUMENTS, config

TESTS = Path(__file__).resolve().parents[1]
LIST = TESTS.parent / "docs" / "faults.md"
NUMBERS = {
    "K": 8,
    "T": 4,
    "D": 5,
    "I": 7,
    "L": 5,
    "N": 4,
    "M": 2,
    "W": 1,
    "G": 3,
    "R": 5,
    "S": 5,
    "C": 2,
    "P": 2,
    "X": 1,
}


def rows(text: str) -> dict[str, list[str]]:
    """Number of each fault -> the tests that its row names."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| [A-Z]\d ", line)]
    return {row[0].strip(): re.findall(r"`([\w/]+\.py(?:::\w+)?)`", row[-1]) for row in cells}


def missing(test: str) -> bool:
    """Whether `file::function`, or a `file` with tests, is not there."""
    name, _, function = test.partition("::")
    if not (TESTS / name).is_file():
        return True
    body = ast.parse((TESTS / name).read_text(encoding="utf-8")).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return function not in functions if function else not functions


def test_every_fault_has_a_test() -> None:
    listed = rows(LIST.read_text(encoding="utf-8"))
    assert list(listed) == [f"{kind}{n}" for kind, last in NUMBERS.items() for n in range(1, last + 1)]
    assert [number for number, tests in listed.items() if not tests] == []
    assert [test for tests in listed.values() for test in tests if missing(test)] == []


def test_a_fault_without_a_test_would_be_seen() -> None:
    assert rows("| K1 | killed | goes on | by hand |") == {"K1": []}
    assert missing("test_none.py")
    assert missing("reliability/test_fault_list.py::test_none")
    assert not missing("reliability/test_fault_list.py")


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert lines, "an error is told"
    return lines[-1]


def test_work_in_progress_is_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """K3: what `prepare` holds before it publishes."""
    work = tmp_path / ".data.preparing"
    write_prepared(work, (9, 7, 8), (2, 3, 2))
    (work / "manifest.json").unlink()
    assert guarded(config(work, tmp_path / "run")) == 2
    assert "not a prepared data set; make one with `semi-fast prepare`" in last_line(capsys)
    assert not (tmp_path / "run").exists()


READ_ONLY = """
import ctypes, os, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
here = sys.argv[1].encode()
user, group = os.getuid(), os.getgid()
if libc.unshare(0x00020000 | 0x10000000):  # a mount namespace and a user namespace of its own
    sys.exit(99)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"0 {user} 1")
Path("/proc/self/gid_map").write_text(f"0 {group} 1")
if libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # changes stay in here
    sys.exit(99)
if libc.mount(here, here, None, 0x1000, None) or libc.mount(here, here, None, 0x1000 | 0x20 | 1, None):  # read-only
    sys.exit(99)
from semi_fast import train
def built(*_, **__):
    raise AssertionError("nothing may be loaded before")
train.build = built
sys.exit(train.main(sys.argv[2:]))
"""


def test_an_output_on_a_read_only_disk_is_refused_first(digits: Path, tmp_path: Path) -> None:
    """D2; in a child with a view of its own of the disk, since nothing is read-only to root."""
    for run_dir in (tmp_path / "new" / "run", tmp_path):
        words = [*ARGUMENTS, f"--data.path={digits}", f"--run_dir={run_dir}"]
        tmp_path.joinpath("new").mkdir(exist_ok=True)
        command = [sys.executable, "-c", READ_ONLY, str(tmp_path), *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if ended.returncode == 99:
            pytest.skip("namespaces are not allowed here")
        assert ended.returncode == 3, ended.stderr
        (line,) = ended.stderr.splitlines()
        assert f"run_dir {run_dir} cannot be written" in line
        tmp_path.joinpath("new").rmdir()


def test_the_number_of_classes_is_that_of_the_data(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """L3."""
    arguments = [*ARGUMENTS, f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}"]
    for key in ("--model.num_classes=100", "--data.num_classes=100"):
        assert main(["train", *arguments, key]) == 2
        assert f"no key {key[2:].split('=')[0]}" in last_line(capsys)
    run(config(digits, tmp_path / "run", "--optim.steps=4"))
    assert "10 classes" in capsys.readouterr().out
    other = write_prepared(tmp_path / "other", (90, 90, 90), (2, 3, 2))
    assert guarded(config(other.root, tmp_path / "run", "--optim.steps=4", resume="auto")) == 2
    assert "of other data" in last_line(capsys)


def test_a_scale_below_one_ends_with_4(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """N3: where no overflow of this size is to be expected any more."""
    small = partial(torch.amp.GradScaler, init_scale=0.5)
    monkeypatch.setattr(train.torch.amp, "GradScaler", small)
    assert guarded(config(digits, tmp_path / "run", "--precision=fp16")) == 4
    assert json.loads((tmp_path / "run" / "nonfinite.json").read_text())["step"] == 0


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """N4; integers are not asked."""
    good = {"a": torch.zeros(3), "n": torch.zeros(3, dtype=torch.int64)}
    checkpoint.save(tmp_path, 1, good.items(), {}, keep=2)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = good | {"b": torch.tensor([0.0, value])}
        with pytest.raises(RuntimeError, match="checkpoint of step 2: b is not finite; nothing was saved"):
            checkpoint.save(tmp_path, 2, bad.items(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"]


def test_fewer_gpus_than_processes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """G2: before a process asks for a GPU that is not there."""
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert guarded(config(digits, tmp_path / "run", device="auto")) == 3
    assert "3 processes on this machine need as many GPUs; it has 2" in last_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_json_is_refused(tmp_path: Path, opening: str) -> None:
    """S2."""
    path = tmp_path / "deep.json"
    path.write_text(opening * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json: damaged or no JSON"):
        read_json(path)


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        ".config.yaml.tmp",
        "env.json",
        "metrics.jsonl",
        "run.lock",
        "status.json",
        "report.html",
    ],
)
def test_a_run_writes_through_no_link(digits: Path, tmp_path: Path, name: str) -> None:
    """S5: whoever may write into the directory must not choose which file of ours a run overwrites."""
    run_dir, target = tmp_path / "run", tmp_path / "target"
    flags = ("--optim.steps=4", "--checkpoint.every=2", "--checkpoint.keep=9")
    run(config(digits, run_dir, *flags))
    target.write_text("mine")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(target)
    guarded(config(digits, run_dir, *flags, resume=str(run_dir / "checkpoints" / "step_000000002")))
    assert target.read_text() == "mine"


@settings(max_examples=30, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=4, unique=True))
@example(["a\nb", "c,d", '"e"', "‮f"])
def test_class_names_of_any_kind(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """P1."""
    root = tmp_path_factory.mktemp("names") / "data"
    write_prepared(root, (2,) * len(names), (1,) * len(names), class_names=names)
    assert load_manifest(root).class_names == tuple(names)


def test_a_clock_that_jumps_changes_nothing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X1: back by an hour at every look."""
    run(config(digits, tmp_path / "steady", "--checkpoint.every=3"))
    now = [time.time()]

    def back() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run(config(digits, tmp_path / "jumping", "--checkpoint.every=3"))
    one, other = (state(tmp_path / name, 12) for name in ("steady", "jumping"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert records(tmp_path / "steady") == records(tmp_path / "jumping")
    summary = json.loads((tmp_path / "jumping" / "summary.json").read_text())
    assert summary["seconds"] > 0
    kept = [sorted(os.listdir(tmp_path / name / "checkpoints")) for name in ("steady", "jumping")]
    assert kept[0] == kept[1]
