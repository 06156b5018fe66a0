"""A preparation that is killed: the next goes on with what is there, and makes what an uninterrupted one makes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from semi_fast.cli import main
from semi_fast.data_prep.readers import downsampled_imagenet, stl10
from semi_fast.data_prep.subset import inputs_digest
from semi_fast.prepared.hashed_file import HashedFile
from semi_fast.prepared.manifest import load_manifest, verify_manifest

from .synthetic_data import write_cifar10_binary, write_ilsvrc, write_imagenet_batches, write_stl10

COUNTS = {"train": 30, "test": 20, "unlabeled": 60}
STL10_FLAGS = ["--labeled-max", "2", "--unlabeled-max", "0"]
# `semi-fast`, killed in the middle of the WRITES-th write of pixels, half of which it has carried out.
KILLED = """
import os, signal, sys
from semi_fast.cli import main
from semi_fast.data_prep.readers import cifar, downsampled_imagenet, stl10
from semi_fast.data_prep.writers import resident
from semi_fast.data_prep.subset import inputs_digest
from semi_fast.prepared.hashed_file import HashedFile

if __name__ == "__main__":
    stl10.COUNTS = {"train": 30, "test": 20, "unlabeled": 60}
    stl10.BLOCK_IMAGES = downsampled_imagenet.BLOCK_IMAGES = 8
    cifar.check_count = downsampled_imagenet._check_published = lambda *_: None
    writes, whole = 0, HashedFile.write

    def write(self, data):
        global writes
        writes += len(data) >= 8 * 4 * 4 * 3
        if writes == int(sys.argv[1]):
            self.file.seek(self.bytes)
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, data)

    HashedFile.write = write
    main(sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stl10, "COUNTS", COUNTS)
    monkeypatch.setattr(stl10, "BLOCK_IMAGES", 8)
    monkeypatch.setattr(downsampled_imagenet, "BLOCK_IMAGES", 8)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Of every file that is finished from now on: bytes that were there, and all bytes."""
    finish, counts = HashedFile.finish, {}

    def counted(self: HashedFile) -> dict[str, object]:
        counts[Path(os.readlink(f"/proc/self/fd/{self.file.fileno()}")).name] = self.kept_bytes, self.bytes
        return finish(self)

    monkeypatch.setattr(HashedFile, "finish", counted)
    return counts


def write_batches(raw: Path) -> Path:
    return write_imagenet_batches(raw, 8)


def write_small_stl10(raw: Path) -> Path:
    return write_stl10(raw, COUNTS)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def killed(writes: int, arguments: list[str]) -> None:
    end = subprocess.run([sys.executable, "-c", KILLED, str(writes), *arguments], check=False)
    assert end.returncode == -signal.SIGKILL


FORMATS = ["resident", "ffcv", "resident,ffcv,dali"]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(("dataset", "write"), [("imagenet127", write_batches), ("stl10", write_small_stl10)])
def test_a_killed_preparation_goes_on(
    tmp_path: Path,
    kept: dict[str, tuple[int, int]],
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    write: Callable[[Path], Path],
    formats: str,
) -> None:
    raw, out = write(tmp_path / "raw"), tmp_path / "data"
    flags = ["prepare", dataset, "--raw", str(raw), "--formats", formats, "--out"]
    assert main([*flags, str(tmp_path / "straight" / "data")]) == 0
    assert all(there == 0 for there, _ in kept.values())
    writes, side = {"stl10": (12, 96), "imagenet127": (190, 8)}[dataset]
    killed(writes * (1 + formats.count(",")), [*flags, str(out)])
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.preparing", "raw", "straight"]
    left = tree(tmp_path / ".data.preparing")
    (name,) = [n for n in left if n.endswith("images.npy" if "resident" in formats else "train.beton") and "train" in n]
    file = (tmp_path / ".data.preparing" / name).stat()
    capsys.readouterr()
    kept.clear()
    assert main([*flags, str(out)]) == 0
    assert "note: going on with " in capsys.readouterr().err
    assert tree(out) == tree(tmp_path / "straight" / "data"), "byte for byte"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw", "straight"]
    assert (out / name).stat().st_ino == file.st_ino, "the same file"
    there, whole, cut = sum(n for n, _ in kept.values()), sum(n for _, n in kept.values()), 8 * 3 * side * side + 2**14
    assert whole > there >= sum(map(len, left.values())) - cut * len(formats.split(",")), "but for what was cut"
    assert there > 0.3 * whole


def test_a_second_kill_is_survived_too(tmp_path: Path, kept: dict[str, tuple[int, int]]) -> None:
    flags = ["prepare", "imagenet127", "--raw", str(write_batches(tmp_path / "raw")), "--out"]
    assert main([*flags, str(tmp_path / "straight" / "data")]) == 0
    for writes in (50, 150, 100):
        killed(writes, [*flags, str(tmp_path / "data")])
    assert main([*flags, str(tmp_path / "data")]) == 0
    assert tree(tmp_path / "data") == tree(tmp_path / "straight" / "data")


def test_nothing_of_other_inputs_or_formats_is_left(tmp_path: Path, kept: dict[str, tuple[int, int]]) -> None:
    """What a killed run left is compared, not trusted: pixels that changed, rows that went, formats not asked for."""
    raw, out = write_batches(tmp_path / "raw"), tmp_path / "data"
    flags = ["prepare", "imagenet127", "--raw", str(raw), "--out"]
    killed(3 * 190, [*flags, str(out), "--formats", "resident,ffcv,dali"])
    assert {name.split("/")[0] for name in tree(tmp_path / ".data.preparing")} == {
        "resident", "ffcv", "dali", "blocks.log"
    }  # fmt: skip
    (tmp_path / ".data.preparing" / "manifest.json").write_text("{}")
    shutil.rmtree(raw)
    write_imagenet_batches(raw, 8, seed=7)
    assert main([*flags, str(out)]) == 0
    assert kept["train_images.npy"][0] == 128, "the header alone is the same"
    assert main([*flags, str(tmp_path / "straight" / "data")]) == 0
    assert tree(out) == tree(tmp_path / "straight" / "data")
    assert sorted(path.name for path in out.rglob("*") if path.is_dir()) == ["resident"]


def test_one_changed_pixel_of_the_input_is_taken_over(tmp_path: Path) -> None:
    raw, out = write_small_stl10(tmp_path / "raw"), tmp_path / "data"
    flags = ["prepare", "stl10", "--raw", str(raw), "--out"]
    killed(12, [*flags, str(out)])
    path = raw / "stl10_binary" / "train_X.bin"
    content = bytearray(path.read_bytes())
    content[3 * 96 * 96 * 9] ^= 1
    path.write_bytes(content)
    assert main([*flags, str(out)]) == 0
    manifest = load_manifest(out)
    verify_manifest(manifest)
    assert manifest.images("train")[9, 0, 0, 0] == content[3 * 96 * 96 * 9]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "read_again"),
    [
        (lambda p: None, 8 + 4),
        (lambda p: flip(p / "resident" / "train_images.npy", 128 + 27648 * 17), 110 - 16),
        (lambda p: flip(p / "blocks.log", 36 * 3), 110 - 24),
        (lambda p: flip(p / "blocks.log", 35), 110),
        (lambda p: os.truncate(p / "blocks.log", 36 * 3 - 1), 110 - 16),
        (lambda p: os.truncate(p / "resident" / "train_images.npy", 128 + 27648 * 16 - 1), 110 - 8),
        (lambda p: (p / "blocks.log").write_bytes(b"\xff" * 720), 110),
        (lambda p: (p / "resident" / "train_images.npy").unlink(), 110),
    ],
)
def test_only_rows_that_are_whole_are_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], read_again: int
) -> None:
    """Read again are those behind the first that is damaged, and the block that was being written, in blocks of 8."""
    resized, rows = stl10._resized, []

    def counted(images: np.ndarray, resolution: int) -> np.ndarray:
        rows.append(len(images))
        return resized(images, resolution)

    monkeypatch.setattr(stl10, "_resized", counted)
    flags = ["prepare", "stl10", "--raw", str(write_small_stl10(tmp_path / "raw")), "--out"]
    assert main([*flags, str(tmp_path / "straight" / "data")]) == 0
    assert sum(rows) == 110
    killed(14, [*flags, str(tmp_path / "data")])
    damage(tmp_path / ".data.preparing")
    rows.clear()
    assert main([*flags, str(tmp_path / "data")]) == 0
    assert sum(rows) == read_again
    assert tree(tmp_path / "data") == tree(tmp_path / "straight" / "data")


def test_what_a_killed_run_adds_behind_a_damaged_block_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    resized = stl10._resized
    monkeypatch.setattr(stl10, "_resized", lambda images, side: rows.append(len(images)) or resized(images, side))
    flags = ["prepare", "stl10", "--raw", str(write_small_stl10(tmp_path / "raw")), "--out", str(tmp_path / "data")]
    killed(14, flags)
    flip(tmp_path / ".data.preparing" / "blocks.log", 36 * 3)
    killed(14, flags)
    assert main(flags) == 0
    assert sum(rows) == 8 + 4


def split_flags(dataset: str, raw: Path) -> list[str]:
    return ["prepare", dataset, "--raw", str(raw), "--labeled-fraction", "0.5", "--out"]


@pytest.mark.parametrize(
    ("writes", "whole_there"),
    [(5, False), (11, True)],
    ids=["killed in the whole set", "killed in the subset"],
)
def test_a_killed_subset_goes_on(
    tmp_path: Path, kept: dict[str, tuple[int, int]], capsys: pytest.CaptureFixture[str], writes: int, whole_there: bool
) -> None:
    raw, out = write_cifar10_binary(tmp_path / "raw", 40), tmp_path / "data"
    flags = [*split_flags("cifar10", raw), str(out)]
    killed(writes, flags)
    assert sorted(path.name for path in tmp_path.iterdir())[0] == (".data.preparing" if whole_there else ".data.whole")
    kept.clear()
    assert main(flags) == 0
    printed = capsys.readouterr().err
    assert ("all 400 train images, prepared before" in printed) == whole_there
    assert "note: going on with" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]
    shutil.move(out, tmp_path / "resumed")
    assert main(flags) == 0
    assert tree(tmp_path / "resumed") == tree(out)
    assert load_manifest(out).command == "semi-fast prepare cifar10 --raw raw --labeled-fraction 0.5 --out data"


def test_a_finished_whole_set_of_other_inputs_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_cifar10_binary(tmp_path / "raw", 40), tmp_path / "data"
    flags = [*split_flags("cifar10", raw), str(out)]
    killed(11, flags)
    path = raw / "cifar-10-batches-bin" / "data_batch_1.bin"
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    killed(11, flags)
    assert len(list((tmp_path / ".data.whole").glob("*/manifest.json"))) == 1, "that of other inputs takes no room"
    os.utime(path, ns=(2, 2))
    capsys.readouterr()
    assert main(flags) == 0
    assert "prepared before" not in capsys.readouterr().err
    assert load_manifest(out).images("train")[0, 0, 0, 0] == content[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]


def test_inputs_are_told_apart_through_links(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
        os.utime(tmp_path / name / "x", ns=(5, 5))
    raw = tmp_path / "raw"
    (raw / "deep").mkdir(parents=True)
    (raw / "deep" / "circle").symlink_to(raw)
    (raw / "nothing").symlink_to(raw / "none")
    (raw / "train").symlink_to(tmp_path / "a")
    digests = [inputs_digest("x", raw), inputs_digest("x", raw), inputs_digest("y", raw)]
    (raw / "train").unlink()
    (raw / "train").symlink_to(tmp_path / "b")
    digests.append(inputs_digest("x", raw))
    (tmp_path / "b" / "x").write_text("c")
    digests.append(inputs_digest("x", raw))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert inputs_digest("x", None) == inputs_digest("x", None)


def test_a_damaged_whole_set_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = write_cifar10_binary(tmp_path / "raw", 40), tmp_path / "data"
    flags = [*split_flags("cifar10", raw), str(out)]
    killed(11, flags)
    (path,) = (tmp_path / ".data.whole").glob("*/resident/train_images.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(flags) == 2
    assert "content differs from its SHA-256" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != ".data.preparing"] == ["raw"]
    assert main(flags) == 0


def test_decoded_images_of_a_killed_subset_are_kept(tmp_path: Path) -> None:
    raw, out = write_ilsvrc(tmp_path / "raw", per_class=100), tmp_path / "data"
    flags = [*split_flags("imagenet127", raw), str(out)]
    killed(4, flags)
    (left,) = (tmp_path / ".data.whole").glob(".*.decoded")
    assert left.stat().st_size > 64 * 32 * 32 * 3
    assert main(flags) == 0
    manifest = load_manifest(out)
    verify_manifest(manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]
    assert (out / "splits" / "prepared.json").is_file()
    assert np.array_equal(np.bincount(manifest.labels("test")), [2, 1])
