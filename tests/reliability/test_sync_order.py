"""What survives a power cut: a file is on the disk before it gets its name, and the name before what follows."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from semi_fast import train
from semi_fast.cli import main
from semi_fast.rundir.checkpoint import MANIFEST, META, TENSORS
from tests.tiny import config

from .forked import forked

CALLS = "openat,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,fsync,fdatasync"
TRACE = ["strace", "-ff", "-qq", "-y", "-s", "4096", "-e", f"trace={CALLS}"]
LINE = re.compile(r"(\w+)\((.*)\) += \d+")  # of a call that succeeded
PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
DESCRIPTOR = re.compile(r"\d+<(.*)>")
NOT_TRACED = 77
PR_SET_PTRACER, ANY = 0x59616D61, -1  # of prctl(2): where a process may be traced by its parents alone


@dataclass(frozen=True)
class Change:
    """A step towards the disk: `made` a file or directory, `written`, `named` from its `path` to another, `synced`."""

    what: str
    path: Path
    to: Path | None = None


def traced(function: Callable[[], int], root: Path, log: Path) -> list[Change]:
    """The changes under `root` that the function makes, in order; it returns 0."""

    def child() -> int:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
        tracer = subprocess.Popen([*TRACE, "-o", str(log), "-p", str(os.getpid())])
        while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
            if tracer.poll() is not None:
                return NOT_TRACED
            time.sleep(0.01)
        code = function()
        tracer.terminate()
        tracer.wait()
        return code

    end = forked(child) if shutil.which("strace") else None
    if end is None or end.code == NOT_TRACED:
        pytest.skip("strace is missing, or may not trace here: the order of syncs was not seen")
    assert end.code == 0, end
    threads = [changes(path.read_text(), root) for path in log.parent.glob(f"{log.name}.*")]
    (found,) = [thread for thread in threads if thread]  # one thread writes, so that there is one order
    return found


def changes(log: str, root: Path) -> list[Change]:
    found = []
    for line in log.splitlines():
        if not (match := LINE.match(line)):
            continue
        call, arguments = match.groups()
        paths = [Path(text) for text in PATH.findall(arguments)]
        if call in ("fsync", "fdatasync"):
            found.append(Change("synced", Path(DESCRIPTOR.fullmatch(arguments)[1])))  # type: ignore[index]
        elif call.startswith("mkdir"):
            found.append(Change("made", paths[0]))
        elif call.startswith(("rename", "link")):
            found.append(Change("named", *paths))
        elif "O_WRONLY" in arguments or "O_RDWR" in arguments:
            found.append(Change("made" if "O_CREAT" in arguments else "written", paths[0]))
    return [change for change in found if root in change.path.parents or change.path == root]


def hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def published(found: list[Change], root: Path) -> list[str]:
    """What gets a name that others look for, in order; asserts for each that all of it is on the disk before, and that
    name after."""
    names, unsynced = [], set()
    for at, change in enumerate(found):
        if change.what == "synced":
            unsynced.discard(change.path)
        elif change.what == "written":
            unsynced.add(change.path)
        elif change.what == "made":
            unsynced |= {change.path, change.path.parent}
        elif change.to is not None:
            if not hidden(change.to, root) and hidden(change.path, root):
                name = str(change.to.relative_to(root))
                early = [path for path in unsynced if path == change.path or change.path in path.parents]
                assert early == [], f"{name} gets its name before the disk has {early}"
                assert found[at + 1] == Change("synced", change.to.parent), f"{name}: {found[at + 1]} follows"
                names.append(name)
            moved = {path for path in unsynced if path == change.path or change.path in path.parents}
            unsynced = (unsynced - moved) | {change.to / path.relative_to(change.path) for path in moved}
            unsynced |= {change.path.parent, change.to.parent}
    return names


def test_what_a_run_publishes_is_on_the_disk_first(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "write_report", lambda run_dirs, page: page)  # which can be drawn again
    run_dir = tmp_path / "runs" / "run"
    flags = ["--optim.steps=4", "--log.every=1", "--checkpoint.every=2", "--checkpoint.keep=9"]
    found = traced(lambda: train.guarded(config(digits, run_dir, *flags)), tmp_path, tmp_path / "trace")
    files = ["config.yaml", "env.json", "split.json", "checkpoints/step_000000002", "checkpoints/step_000000004"]
    files += ["env.json", "summary.json", "status.json"]
    assert published(found, run_dir.parent) == [f"run/{name}" for name in files]

    root = run_dir / "checkpoints"
    for directory in (run_dir.parent, run_dir, root):
        at = found.index(Change("made", directory))
        assert found[at + 1] == Change("synced", directory.parent), "else all in it could be lost with its name"
    before = 0
    for step in (2, 4):
        final = root / f"step_{step:09d}"
        (at,) = [i for i, change in enumerate(found) if change.to == final]
        own = found[at].path
        synced = [c.path for c in found[:at] if c.what == "synced" and (c.path == own or own in c.path.parents)]
        assert synced == [own / TENSORS, own / META, own / MANIFEST, own], "the manifest last, then their directory"
        metrics = [change.what for change in found[before:at] if change.path == run_dir / "metrics.jsonl"]
        assert metrics[-2:] == ["made", "synced"], "a checkpoint counts bytes of metrics that are on the disk"
        before = at


def test_what_prepare_publishes_is_on_the_disk_first(tmp_path: Path) -> None:
    out = tmp_path / "data" / "digits"
    words = ["prepare", "digits", "--out", str(out), "--formats", "resident,ffcv,dali"]
    found = traced(lambda: main(words), tmp_path, tmp_path / "trace")
    assert published(found, out.parent) == ["digits"]
    (at,) = [i for i, change in enumerate(found) if change.to == out]
    assert found[at - 1] == Change("synced", found[at].path), "the directory itself comes last"
    assert found[:2] == [Change("made", out.parent), Change("synced", tmp_path)]
    synced = {change.path for change in found[:at] if change.what == "synced"}
    assert synced >= {found[at].path / path.relative_to(out) for path in out.rglob("*")}, "all files and directories"


@pytest.mark.parametrize("lost", ["file", "directory", "name", "order"])
def test_a_sync_that_is_left_out_would_be_seen(lost: str, tmp_path: Path) -> None:
    own, final = tmp_path / ".own", tmp_path / "final"
    steps = {
        "directory made": Change("made", own),
        "made": Change("made", own / "file"),
        "file": Change("synced", own / "file"),
        "directory": Change("synced", own),
        "naming": Change("named", own, final),
        "name": Change("synced", tmp_path),
    }
    assert published(list(steps.values()), tmp_path) == ["final"]
    kept = [change for name, change in steps.items() if name != lost]
    if lost == "order":
        kept.insert(2, kept.pop(4))
    with pytest.raises((AssertionError, IndexError)):
        published(kept, tmp_path)
