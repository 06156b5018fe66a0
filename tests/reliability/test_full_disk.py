"""A disk that fills up while a run writes its small files: it ends with 3, says so, and goes on once there is room.

Checkpoints have their own test; here it is what stands beside them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from semi_fast import disk, train
from semi_fast.prepared import manifest
from semi_fast.rundir.checkpoint import TENSORS, newest, published
from semi_fast.rundir.directory import locked_run
from semi_fast.rundir.runlog import MetricsFile
from semi_fast.train import guarded, run
from tests.test_engine import records
from tests.tiny import config

from .forked import forked
from .test_checkpoint_faults import largest_file

FLAGS = ("--checkpoint.every=2", "--checkpoint.keep=9", "--log.every=1")
TORN = 40
"""Bytes of a record for which there is room."""


@pytest.fixture(scope="module", autouse=True)
def small_page() -> Iterator[None]:
    """Drawing the page takes longer than the run."""

    def page(run_dirs: list[Path], path: Path) -> Path:
        disk.write_text(path, f"<title>{run_dirs[0].name} · semi_fast report</title>\n")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", page)
        yield


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(config(digits, run_dir, *FLAGS))
    return run_dir


def on_a_disk_full_from(
    name: str, nth: int, digits: Path, run_dir: Path, *flags: str, resume: str = "auto"
) -> Callable[[], int]:
    """A run whose disk takes nothing any more from the `nth` writing of that file on, status.json included."""

    def child() -> int:
        text, append, sealed = disk.write_text, MetricsFile.append, manifest.write_sealed
        writings, full = 0, False

        @contextmanager
        def filling(path: Path, room: int = 0) -> Iterator[None]:
            nonlocal writings, full
            writings += path.name == name
            full |= path.name == name and writings == nth
            if not full:
                yield
                return
            with largest_file(room):
                yield

        def limited_text(path: Path, content: str) -> None:
            with filling(path):
                text(path, content)

        def limited_append(self: MetricsFile, content: dict[str, Any]) -> None:
            with filling(self.path, self.path.stat().st_size + TORN):
                append(self, content)

        def limited_sealed(path: Path, *content: Any) -> str:
            with filling(path.with_name("split.json")):
                return sealed(path, *content)

        disk.write_text, MetricsFile.append, manifest.write_sealed = limited_text, limited_append, limited_sealed
        return guarded(config(digits, run_dir, *FLAGS, *flags, resume=resume))

    return child


@pytest.mark.parametrize(
    ("name", "nth", "saved"),
    [
        ("config.yaml", 1, []),
        ("env.json", 1, []),
        ("split.json", 1, []),
        ("metrics.jsonl", 1, []),
        ("metrics.jsonl", 6, [2, 4]),  # of step 5
        ("metrics.jsonl", 14, [2, 4, 6, 8, 10]),  # the last evaluation
        ("env.json", 2, [2, 4, 6, 8, 10, 12]),
        ("summary.json", 1, [2, 4, 6, 8, 10, 12]),
        ("report.html", 1, [2, 4, 6, 8, 10, 12]),
        ("status.json", 1, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_a_run_whose_disk_fills_up_says_so_and_goes_on_once_there_is_room(
    name: str, nth: int, saved: list[int], whole: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ended = forked(on_a_disk_full_from(name, nth, digits, run_dir))
    assert ended.code == 3, ended
    lines = ended.output.splitlines()
    assert lines[-1] == f"semi-fast: {run_dir / name} could not be written: File too large; disk full?"
    assert "Traceback" not in ended.output
    assert not (run_dir / "status.json").exists()
    assert (run_dir / "summary.json").exists() == (name == "status.json"), "else it would be taken for finished"
    assert [path.name for path in run_dir.rglob(".*.tmp")] == []
    assert [int(path.name[-9:]) for path in reversed(published(run_dir / "checkpoints"))] == saved
    assert newest(run_dir / "checkpoints", pytest.fail) is None or saved
    if name == "metrics.jsonl":
        assert (run_dir / name).read_bytes()[-1:] != b"\n", "a record is torn"
    run(config(digits, run_dir, *FLAGS, resume="auto"))
    ours, theirs = (published(one / "checkpoints") for one in (whole, run_dir))
    assert [path.name for path in theirs] == [path.name for path in ours]
    assert [(path / TENSORS).read_bytes() for path in theirs] == [(path / TENSORS).read_bytes() for path in ours]
    assert records(run_dir) == records(whole)
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == 0
    assert (run_dir / "summary.json").exists()


def test_what_ended_a_run_is_told_when_the_disk_is_full_too(digits: Path, tmp_path: Path) -> None:
    """nonfinite.json and status.json, which would say so, cannot be written."""
    run_dir = tmp_path / "run"
    ended = forked(on_a_disk_full_from("nonfinite.json", 1, digits, run_dir, "--optim.lr=1e30"))
    assert ended.code == 4, ended
    assert ended.output.splitlines()[-1].startswith("semi-fast: loss, outputs or gradients are not finite at step ")
    assert not (run_dir / "status.json").exists()


def test_a_finished_run_that_goes_back_is_not_finished_until_it_is(whole: Path, digits: Path, tmp_path: Path) -> None:
    """By its summary, which a sweep goes by."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    back = str(run_dir / "checkpoints" / "step_000000002")
    ended = forked(on_a_disk_full_from("metrics.jsonl", 2, digits, run_dir, resume=back))
    assert ended.code == 3, ended
    assert not (run_dir / "summary.json").exists()
    assert [path.name for path in published(run_dir / "checkpoints")] == ["step_000000002"]


def test_an_error_that_is_no_full_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"missing/x could not be written: os.open: No such file or dir.* \(ENOENT\);"
    ):
        disk.write_text(tmp_path / "missing" / "x", "")
    with (
        pytest.raises(RuntimeError, match=r"x could not be written: No space left on device; disk full\?$"),
        disk.writing(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_lock_is_named_too(tmp_path: Path) -> None:
    """The first file of a run."""

    def child() -> None:
        try:
            with largest_file(0), locked_run(tmp_path / "run", "none", None):
                raise AssertionError("nothing may be done without it")
        except RuntimeError as error:
            print(error)

    ended = forked(child)
    assert ended.output == f"{tmp_path / 'run' / 'run.lock'} could not be written: File too large; disk full?\n"
