"""Disks that lack something: what is done without it, and what is said of the rest; and directories of one process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semi_fast import disk
from semi_fast.cli import main
from semi_fast.disk import check_free, fresh_directory, locked, locked_descriptor, publish_new
from semi_fast.errors import described
from semi_fast.prepared.manifest import load_manifest, load_split
from semi_fast.train import guarded

from .tiny import config


def refusing(number: int) -> Callable[..., Any]:
    """A system call that the file system does not have; the system names no file."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


SPLIT = ("--labeled-max", "20", "--unlabeled-max", "40")


@pytest.mark.parametrize("number", sorted({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK}))
def test_without_hard_links_a_new_name_is_reserved_first(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(number))
    (tmp_path / "hidden").write_text("mine")
    publish_new(tmp_path / "hidden", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "mine"
    (tmp_path / "hidden").write_text("another")
    with pytest.raises(FileExistsError):
        publish_new(tmp_path / "hidden", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "mine", "never replaced"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            publish_new(tmp_path / "hidden", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").touch()  # as a kill leaves it
    publish_new(tmp_path / "hidden", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "another"


def test_a_split_is_written_without_hard_links(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in digits.iterdir():
        (data / path.name).symlink_to(path)
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    words = ["split", str(data), "--name", "lt"]
    assert main([*words, *SPLIT]) == 0
    load_split(data / "splits" / "lt.json", load_manifest(data))
    assert main([*words, *SPLIT[:2], "--unlabeled-max", "30"]) == 2
    assert "lt.json exists and is another split" in lines(capsys)[-1]
    monkeypatch.setattr(os, "link", refusing(errno.EIO))
    assert main(["split", str(data), "--name", "other", *SPLIT]) == 3
    name = data / "splits" / "other.json"
    assert lines(capsys) == [
        f"semi-fast: {name}: link: Input/output error (EIO); check that place, or choose another",
    ]
    assert [path.name for path in name.parent.iterdir()] == ["lt.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_directory_that_cannot_be_synced_is_no_failure(
    number: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refusing(number)()
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("semi_fast.train.write_report", lambda run_dirs, page: page)
    assert main(["prepare", "digits", "--out", str(tmp_path / "new" / "data")]) == 0
    assert guarded(config(digits, tmp_path / "run", "--optim.steps=4")) == 0
    assert (tmp_path / "run" / "summary.json").exists()
    assert synced, "files are"


@pytest.mark.parametrize(
    ("kind", "number", "name", "words"),
    [
        (stat.S_ISDIR, errno.EIO, "", ["prepare"]),
        (stat.S_ISREG, errno.EINVAL, ".data.preparing/resident/train_labels.npy", ["prepare"]),
    ],
)
def test_a_sync_that_fails_names_the_file_and_the_call(
    kind: Callable[[int], bool],
    number: int,
    name: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fsync(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            refusing(number)()

    monkeypatch.setattr(os, "fsync", fsync)
    place = tmp_path / "data" if name else tmp_path / "above" / "data"
    assert main(["prepare", "digits", "--out", str(place)]) == 3
    failed = f"fsync: {os.strerror(number)} ({errno.errorcode[number]}); check that place, or choose another"
    assert lines(capsys) == [f"semi-fast: {tmp_path / name}: {failed}"]
    assert not place.exists()


def test_a_file_of_a_run_that_cannot_be_synced_is_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    (tmp_path / "run").mkdir()
    assert guarded(config(digits, tmp_path / "run")) == 3
    (line,) = lines(capsys)
    assert f"{tmp_path / 'run' / 'config.yaml'} could not be written: fsync: Input/output error (EIO)" in line


WITHOUT = sorted({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL})


@pytest.mark.parametrize("number", [None, *WITHOUT])
def test_a_directory_is_locked_by_one(number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With locks or without."""
    if number is not None:
        monkeypatch.setattr(fcntl, "flock", refusing(number))
    lock = tmp_path / "new" / "run.lock"
    check_free(lock, "run_dir x")
    assert not lock.parent.exists(), "nothing is written"
    holder = f"run_dir x is in use by process {os.getpid()} on {socket.gethostname()}; wait for it, or choose another"
    for _ in range(2):
        with locked(lock, "run_dir x"):
            with pytest.raises(ValueError, match=holder):
                check_free(lock, "run_dir x")
            with pytest.raises(ValueError, match=holder), locked(lock, "run_dir x"):
                raise AssertionError("two have it")
        check_free(lock, "run_dir x")
    assert [path.name for path in lock.parent.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("locks_now", [True, False])
def test_what_a_killed_process_without_locks_left_is_for_the_user_to_delete(
    locks_now: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may be at work on another machine: no process id tells."""
    if not locks_now:
        monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    lock, marker = tmp_path / "run.lock", tmp_path / "run.lock.held"
    lock.write_text("")
    marker.write_text("process 7 on another\n")
    said = f"in use by process 7 on another; wait for it, or choose another; if that has ended, delete {marker}, which"
    with pytest.raises(ValueError, match=said):
        check_free(lock, "--out x")
    with pytest.raises(ValueError, match=said), locked(lock, "--out x"):
        raise AssertionError("it may be at work")
    assert marker.exists()
    marker.unlink()
    with locked(lock, "--out x"):
        pass


def test_a_run_and_a_preparation_need_no_locks(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    monkeypatch.setattr("semi_fast.train.write_report", lambda run_dirs, page: page)
    assert main(["prepare", "digits", "--out", str(tmp_path / "data")]) == 0
    assert guarded(config(digits, tmp_path / "run", "--optim.steps=4")) == 0
    assert list(tmp_path.rglob("*.held")) == []
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    assert guarded(config(digits, tmp_path / "run", "--optim.steps=4", resume="auto")) == 3
    assert lines(capsys)[-1].startswith(f"semi-fast: {tmp_path / 'run' / 'run.lock'}: flock: Input/output error (EIO);")


def test_who_only_looks_is_in_nobody_s_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that is over once the lock has waited."""
    (tmp_path / "run.lock").touch()
    looking = os.open(tmp_path / "run.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda _: os.close(looking))
    with locked(tmp_path / "run.lock", "run_dir x"):
        pass


def test_a_directory_can_be_held_itself(tmp_path: Path) -> None:
    one, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    with (
        locked_descriptor(one, tmp_path, "--out x"),
        pytest.raises(ValueError, match="--out x is in use by another process"),
        locked_descriptor(other, tmp_path, "--out x"),
    ):
        raise AssertionError("two have it")
    os.close(one)
    os.close(other)


def test_what_a_kill_leaves_of_a_file_is_written_over_and_no_use(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    left = [run_dir / f".{name}.tmp" for name in ("status.json", "config.yaml")]
    for path in left:
        path.write_text("torn")
    monkeypatch.setattr("semi_fast.train.write_report", lambda run_dirs, page: page)
    assert guarded(config(digits, run_dir, "--optim.steps=4")) == 0
    assert not any(path.exists() for path in left)


def test_a_fresh_directory_is_fresh(tmp_path: Path) -> None:
    wanted = tmp_path / "runs" / "digits_semi_20261128-120000"
    found = [fresh_directory(wanted) for _ in range(3)]
    assert found == [wanted, Path(f"{wanted}_2"), Path(f"{wanted}_3")]
    assert all(path.is_dir() for path in found)


def test_an_error_of_the_system_says_which_file_and_which_call(tmp_path: Path) -> None:
    """Whatever raises it: `os.mkdir` stands in pathlib."""
    out = "check that place, or choose another"
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "no" / "x").mkdir()
    assert described(caught.value) == f"{tmp_path / 'no' / 'x'}: os.mkdir: No such file or directory (ENOENT); {out}"
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a").rename(tmp_path / "b")
    assert described(caught.value).startswith(f"{tmp_path / 'a'} -> {tmp_path / 'b'}: os.rename: No such file")
    with pytest.raises(TimeoutError) as caught, disk.named(tmp_path / "x", "read"):
        refusing(errno.ETIMEDOUT)()
    assert described(caught.value) == f"{tmp_path / 'x'}: read: Connection timed out (ETIMEDOUT); {out}"
    assert described(OSError("a library's\nown")) == "a library's own"
    assert described(OSError(errno.EIO, "gone")).startswith("OSError: gone (EIO)")
    assert described(OSError(errno.ENOSPC, "No space left on device", "x")) == "x: No space left on device; disk full?"
    assert described(KeyboardInterrupt()) == "interrupted"
    assert described(MemoryError()) == "MemoryError"
