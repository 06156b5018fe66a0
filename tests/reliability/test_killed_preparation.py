"""Preparations that are killed at any time: nothing half made gets the final name, and the next run makes it whole."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from semi_fast.cli import main
from semi_fast.data_prep.readers import stl10
from semi_fast.prepared.manifest import load_manifest, load_split, verify_manifest
from tests.reliability.figures import amount, record
from tests.reliability.forked import Ended, forked
from tests.synthetic_data import write_cifar10_binary, write_image_folder, write_stl10

COUNTS = {"train": 60, "test": 40, "unlabeled": 120}
FORMATS = ["--formats", "resident,ffcv,dali"]


def digits_flags(root: Path) -> list[str]:
    return ["digits", *FORMATS]


def cifar10_flags(root: Path) -> list[str]:
    return ["cifar10", "--raw", str(write_cifar10_binary(root / "raw", 40)), "--formats", "ffcv,dali"]


def subset_flags(root: Path) -> list[str]:
    raw = write_cifar10_binary(root / "raw", 40)
    return ["cifar10", "--raw", str(raw), *FORMATS, "--labeled-fraction", "0.5"]


def stl10_flags(root: Path) -> list[str]:
    return ["stl10", "--raw", str(write_stl10(root / "raw", COUNTS)), *FORMATS, "--image-format", "png"]


def folder_flags(root: Path) -> list[str]:
    raw = write_image_folder(root / "raw", per_class=50, unlabeled=40)
    (raw / "train" / "cat" / "bad.png").write_bytes(b"nothing")
    return ["folder", "--raw", str(raw), *FORMATS, "--on-bad", "skip"]


PREPARED: dict[str, Callable[[Path], list[str]]] = {
    "digits": digits_flags,
    "cifar10": cifar10_flags,
    "a subset of cifar10": subset_flags,
    "stl10": stl10_flags,
    "folder": folder_flags,
}


@pytest.fixture(autouse=True)
def small_stl10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stl10, "COUNTS", COUNTS)
    monkeypatch.setattr(stl10, "BLOCK_IMAGES", 8)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def prepared(flags: list[str], out: Path, **limits: float) -> Ended:
    return forked(lambda: main(["prepare", *flags, "--out", str(out)]), **limits)  # type: ignore[arg-type]


def fault(out: Path) -> str:
    """What is wrong with a data set that has its final name; nothing if it has not."""
    try:
        if out.exists():
            manifest = load_manifest(out)
            verify_manifest(manifest)
            for path in (out / "splits").glob("*"):
                load_split(path, manifest)
    except ValueError as error:
        return str(error)
    return ""


def left_behind(out: Path) -> str:
    if out.exists():
        return "after the rename"
    return "in the middle" if any(out.parent.glob(".data.*")) else "before the first file"


def test_preparations_killed_at_random_leave_nothing_or_all(tmp_path: Path) -> None:
    kills, began = amount(10, 100), time.monotonic()
    flags, expected, lasts = {}, {}, {}
    for name, write in PREPARED.items():
        (tmp_path / name).mkdir()
        flags[name], straight = write(tmp_path / name), tmp_path / name / "straight" / "data"
        assert main(["prepare", *flags[name], "--out", str(straight)]) == 0  # here, so that children have all imported
        expected[name] = tree(straight)
        start = time.monotonic()
        assert prepared(flags[name], tmp_path / name / "again" / "data").code == 0
        lasts[name] = time.monotonic() - start
        assert tree(tmp_path / name / "again" / "data") == expected[name], "else nothing is shown below"
    met: Counter[str] = Counter()
    failures, seed = [], 0
    while met.total() < kills or met["in the middle"] < kills // 4:  # where they fall is the machine's matter
        seed += 1
        name, rng = list(PREPARED)[seed % len(PREPARED)], np.random.default_rng(seed)
        out, what = tmp_path / name / f"seed_{seed}" / "data", f"seed {seed}, {name}"
        for _ in range(rng.integers(1, 4)):
            end = prepared(flags[name], out, kill_after=rng.uniform(0, lasts[name]))
            if end.signal is not None:
                assert end.signal == signal.SIGKILL, f"{what}: {end}"
                met[left_behind(out)] += 1
                if found := fault(out):
                    failures.append(f"{what}, killed: {found}")
            if out.exists():
                break
        published = out.exists()
        end = None if published else prepared(flags[name], out)
        if end is not None and end.code != 0:
            failures.append(f"{what}, started again: {end.output}")
        elif tree(out) != expected[name]:
            failures.append(f"{what}: other files than an uninterrupted preparation")
        beside = {path.name for path in out.parent.iterdir()} - {"data"}
        if beside and not (published and beside == {".data.whole"}):  # killed between the rename and cleaning up
            failures.append(f"{what}: {sorted(beside)} is left")
        shutil.rmtree(out.parent)
    note = ", ".join(f"{count} {what}" for what, count in sorted(met.items()))
    record(
        "prepare killed at random", made=met.total(), failures=len(failures),
        goal="100 kills, no partial data set accepted", seconds=time.monotonic() - began, note=note,
    )  # fmt: skip
    assert failures == []
