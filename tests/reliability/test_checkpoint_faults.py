"""Kills and full disks while a checkpoint is written: the last that was reported loads, and nothing is half there."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semi_fast.rundir import checkpoint
from semi_fast.train import guarded, run
from tests.tiny import config

from .figures import amount, record
from .forked import forked

SEED = 6
KEEP = 2
UNLIMITED = resource.RLIM_INFINITY
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


def tensors_of(step: int, elements: int = 20_000) -> dict[str, Tensor]:
    """A state that only this step has."""
    draw = torch.Generator().manual_seed(step)
    return {"weights": torch.randn(elements, generator=draw), "step": torch.tensor(step)}


def meta_of(step: int, characters: int = 0) -> dict[str, Any]:
    return {"step": step, "text": "x" * characters}


def save(root: Path, step: int, **sizes: int) -> None:
    tensors = tensors_of(step, sizes.get("elements", 20_000))
    checkpoint.save(root, step, tensors.items(), meta_of(step, sizes.get("characters", 0)), keep=KEEP)


def newest_step(root: Path, **sizes: int) -> int:
    """The step of the newest checkpoint, 0 for none; nothing newer is damaged and it holds what was saved."""
    skipped: list[str] = []
    found = checkpoint.newest(root, skipped.append)
    assert skipped == [], skipped
    if found is None:
        return 0
    step = found.meta["step"]
    assert found.path.name == f"step_{step:09d}"
    assert found.meta == meta_of(step, sizes.get("characters", 0))
    expected = tensors_of(step, sizes.get("elements", 20_000))
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    return step


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("step_"))


def test_a_kill_at_a_random_moment_loses_no_checkpoint(tmp_path: Path) -> None:
    kills, began, rng = amount(25, 200), time.monotonic(), np.random.default_rng(SEED)
    root, last, in_writing, saves = tmp_path, 0, 0, 0

    def endless() -> None:
        for step in count(last + 1):
            save(root, step)
            os.write(1, f"{step}\n".encode())

    for kill in count():
        if kill >= kills and in_writing > kills // 10:  # kills that met nobody writing show nothing
            break
        delay = float(rng.uniform(0.01, 0.2))
        ended = forked(endless, kill_after=delay)
        where = f"seed {SEED}, kill {kill} after {delay:.4f} s"
        assert ended.signal == signal.SIGKILL, f"{where}: {ended}"
        reported = [int(line) for line in ended.output.split("\n")[:-1]]
        assert reported == list(range(last + 1, last + 1 + len(reported))), where
        last, saves = last + len(reported), saves + len(reported)
        step = newest_step(root)
        assert step in (last, last + 1), f"{where}: {step} after {last} was reported"
        in_writing += bool(left_over(root))
        save(root, last := step + 1)
        assert left_over(root) == [], where
        assert newest_step(root) == last, where
        assert len(checkpoint.published(root)) == min(KEEP, last), where
    record(
        "SIGKILL at a random moment while checkpoints are written",
        made=kills,
        failures=0,
        goal="200 kills, 0 lost",
        seconds=time.monotonic() - began,
        note=f"{in_writing} left a half-written one; {saves} were saved meanwhile",
    )


def test_what_is_called_otherwise_is_never_counted_or_touched(tmp_path: Path) -> None:
    """Copies, backups and notes of the user; and files, and links, which are no checkpoints of ours."""
    for step in range(1, KEEP + 1):
        save(tmp_path, step)
    mine = ["step_000000001_paper", "step_000000001.bak", "step_best", "step_1", "step_0000000001", "step_00000000९"]
    mine += [".tmp-notes", ".tmp-1-2-old", ".del-step_000000001_paper", ".del-me"]
    for name in mine:
        shutil.copytree(tmp_path / "step_000000001", tmp_path / name)
    files = [".tmp-7-7", ".del-step_000000007", "step_000000000"]
    for name in files:
        (tmp_path / name).write_text("mine")
    for name in (".tmp-1-2", ".del-step_000000000"):
        (tmp_path / name).mkdir()
    for step in (KEEP + 1, KEEP + 2):
        save(tmp_path, step)
    ours = [f"step_{step:09d}" for step in range(3, KEEP + 3)]
    assert sorted(path.name for path in checkpoint.published(tmp_path)) == ours
    checkpoint.retire_after(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ours[0], *mine, *files])
    assert newest_step(tmp_path) == 3


def test_a_link_to_a_checkpoint_is_one_and_goes_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (tmp_path / "step_000000001").rename(kept / "step_000000001")
    (tmp_path / "step_000000001").symlink_to(kept / "step_000000001")
    assert newest_step(tmp_path) == 1
    checkpoint.retire_after(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert newest_step(kept) == 1


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step_000000001").iterdir()}
    assert modes == dict.fromkeys((checkpoint.TENSORS, checkpoint.META, checkpoint.MANIFEST), 0o666 & ~umask)


def at_changes(reached: Callable[[], None]) -> None:
    """Call `reached` before every change of the disk that Python makes, and before and after every fsync; in a child
    alone, as a hook stays."""
    fsync, save_file = os.fsync, checkpoint.save_file

    def around(function: Callable[..., None]) -> Callable[..., None]:
        def observed(*arguments: Any) -> None:
            reached()
            function(*arguments)
            reached()

        return observed

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            reached()

    os.fsync, checkpoint.save_file = around(fsync), around(save_file)  # safetensors writes where no hook sees it
    sys.addaudithook(hook)


def killed_at(root: Path, step: int, point: int) -> Callable[[], None]:
    """A child that saves and dies at that change, or says how many there were."""

    def child() -> None:
        reached = 0

        def die() -> None:
            nonlocal reached
            reached += 1
            if reached == point:
                os.kill(os.getpid(), signal.SIGKILL)

        at_changes(die)
        save(root, step)
        os.write(1, f"{reached}".encode())

    return child


@pytest.mark.parametrize("again", [False, True], ids=["new", "the same step again"])
def test_a_kill_at_every_change_of_the_disk_loses_no_checkpoint(again: bool, tmp_path: Path) -> None:
    """A save that deletes what earlier kills left, publishes, and retires the oldest; or that replaces its like."""
    began, before = time.monotonic(), tmp_path / "before"
    for step in range(1, KEEP + 1):
        save(before, step)
    shutil.copytree(before / "step_000000001", before / ".del-step_000000000")
    shutil.copytree(before / "step_000000001", before / ".tmp-1-3")
    new = KEEP if again else KEEP + 1
    older = KEEP - 1 if again else KEEP
    published = point = 0
    while True:
        point += 1
        root = tmp_path / f"killed_{point}"
        shutil.copytree(before, root)
        ended = forked(killed_at(root, new, point))
        step = newest_step(root)
        if ended.signal is None:
            break
        assert ended.signal == signal.SIGKILL, f"point {point}: {ended}"
        assert step in (older, new), f"point {point}: {step}"
        assert step == new or not published or again, f"point {point}: it was published before"
        published += step == new
        save(root, new + 1)
        assert left_over(root) == [], f"point {point}"
        assert newest_step(root) == new + 1, f"point {point}"
        shutil.rmtree(root)
    assert (ended.code, step, ended.output) == (0, new, f"{point - 1}"), ended
    assert point > 20, "a save changes the disk more often: the hook sees nothing"
    assert 0 < published < point - 1
    record(
        f"SIGKILL at every change of the disk in one save ({'again' if again else 'new'} step)",
        made=point - 1,
        failures=0,
        goal="every one, 0 lost",
        seconds=time.monotonic() - began,
    )


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing more than that to a file gives EFBIG, as a full disk gives ENOSPC."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))


def sizes_of(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir()}


@pytest.mark.parametrize(
    ("of", "every", "sizes"),
    [
        (checkpoint.TENSORS, 4096, {"elements": 60_000}),
        (checkpoint.META, 4096, {"elements": 1, "characters": 60_000}),
        (checkpoint.MANIFEST, 16, {"elements": 1}),
    ],
)
def test_a_full_disk_takes_nothing_away_and_is_told(of: str, every: int, sizes: dict[str, int], tmp_path: Path) -> None:
    """At every limit up to the whole of the largest file, which is each of the three once."""
    began = time.monotonic()
    save(tmp_path, 1, **sizes)
    largest = sizes_of(tmp_path / "step_000000001")
    assert max(largest, key=largest.__getitem__) == of
    limits = range(0, largest[of], every)

    def child() -> None:
        for limit in limits:
            with largest_file(limit), pytest.raises(checkpoint.NotSavedError, match=r"step 2 .* disk full\?$"):
                save(tmp_path, 2, **sizes)
            assert [path.name for path in tmp_path.iterdir()] == ["step_000000001"], limit
            assert newest_step(tmp_path, **sizes) == 1, limit
            os.write(1, b".")
        with largest_file(largest[of]):
            save(tmp_path, 2, **sizes)

    ended = forked(child)
    assert (ended.code, ended.output) == (0, "." * len(limits)), ended
    assert newest_step(tmp_path, **sizes) == 2
    record(
        f"disk full in {of}",
        made=len(limits),
        failures=0,
        goal=f"every limit of {every} bytes, the one before intact, no false success",
        seconds=time.monotonic() - began,
        note=f"{largest[of]} bytes",
    )


NO_MOUNT = 77


def on_a_small_disk(root: Path, options: str, **sizes: int) -> Callable[[], int]:
    """A child that mounts a real file system for itself, on which a first checkpoint fits and a second does not."""

    def child() -> int:
        libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
            return NO_MOUNT
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        if libc.mount(b"tmpfs", os.fsencode(root), b"tmpfs", 0, options.encode()):
            return NO_MOUNT
        save(root, 1, **sizes)
        with pytest.raises(checkpoint.NotSavedError, match=r"step 2 .* disk full\?$"):
            save(root, 2, **sizes)
        assert os.listdir(root) == ["step_000000001"]
        assert newest_step(root, **sizes) == 1
        shutil.rmtree(root / "step_000000001")
        save(root, 3, **sizes)
        return 0

    return child


@pytest.mark.parametrize(
    ("options", "elements"),
    [("size=256k", 40_000), *((f"nr_inodes={n}", 1) for n in range(5, 9))],
    ids=["no block", "no name for the directory", "none for tensors", "none for meta", "none for manifest"],
)
def test_a_small_disk_takes_nothing_away_and_is_told(options: str, elements: int, tmp_path: Path) -> None:
    ended = forked(on_a_small_disk(tmp_path, options, elements=elements))
    if ended.code == NO_MOUNT:
        pytest.skip("this machine lets no user mount: the small disk was not tried")
    assert (ended.code, ended.output) == (0, ""), ended


def states(run_dir: Path) -> dict[str, bytes]:
    """The tensors of every checkpoint as they stand on the disk."""
    paths = checkpoint.published(run_dir / "checkpoints")
    return {path.name: (path / checkpoint.TENSORS).read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(config(digits, run_dir, "--checkpoint.every=2", "--checkpoint.keep=9"))
    return run_dir


def trained_on_a_disk_full_at(
    full: Callable[[int], bool], digits: Path, run_dir: Path, *flags: str
) -> Callable[[], int]:
    """A run whose checkpoints of some steps do not fit; everything else does."""

    def child() -> int:
        publish = checkpoint.save

        def limited(root: Path, step: int, *arguments: Any, **keep: Any) -> Path:
            with largest_file(2**17 if full(step) else UNLIMITED):
                return publish(root, step, *arguments, **keep)

        checkpoint.save = limited
        return guarded(config(digits, run_dir, "--checkpoint.keep=9", *flags))

    return child


def warnings_in(output: str) -> list[int]:
    """The steps that were not saved, by the lines that say so."""
    lines = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert all(line.endswith("disk full?; going on, with the checkpoint before it") for line in lines), lines
    return [int(line.split("checkpoint of step ")[1].split()[0]) for line in lines]


@pytest.mark.parametrize(
    ("every", "full", "warned", "code", "saved"),
    [
        (2, range(3, 13), [4, 6], 3, [2]),
        (5, range(11, 13), [], 3, [5, 10]),
        (2, range(3, 7), [4, 6], 0, [2, 8, 10, 12]),
        (2, (2, 4, 8, 10), [2, 4, 8, 10], 0, [6, 12]),
    ],
    ids=["ends at the third", "ends at the last", "goes on after two", "counts those in a row"],
)
def test_a_run_on_a_full_disk_ends_with_3_or_goes_on_and_loses_nothing(
    every: int,
    full: range,
    warned: list[int],
    code: int,
    saved: list[int],
    whole: Path,
    digits: Path,
    tmp_path: Path,
) -> None:
    run_dir, flags = tmp_path / "run", (f"--checkpoint.every={every}",)
    ended = forked(trained_on_a_disk_full_at(full.__contains__, digits, run_dir, *flags))
    assert ended.code == code, ended
    assert warnings_in(ended.output) == warned
    assert [int(name[-9:]) for name in sorted(states(run_dir))] == saved
    assert left_over(run_dir / "checkpoints") == []
    assert json.loads((run_dir / "status.json").read_text())["exit_code"] == code
    assert (run_dir / "summary.json").exists() == (code == 0)
    if code:
        assert ended.output.splitlines()[-1].endswith("disk full?"), ended.output
        run(config(digits, run_dir, "--checkpoint.keep=9", *flags, resume="auto"))
    ours, theirs = states(whole), states(run_dir)
    assert theirs["step_000000012"] == ours["step_000000012"]
