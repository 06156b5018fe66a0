"""STL-10's binaries: exact pixels, order and labels, bad input by name, memory that does not grow with the files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semi_fast.cli import main
from semi_fast.data_prep.prepare import prepare_stl10
from semi_fast.data_prep.readers import stl10
from semi_fast.prepared.manifest import load_manifest, verify_manifest
from tests.synthetic_data import STL10_NAMES, stl10_sets, write_stl10

COUNTS = {"train": 30, "test": 20, "unlabeled": 7}
PUBLISHED = dict(stl10.COUNTS)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published counts replaced by small ones, and blocks that do not divide them."""
    monkeypatch.setattr(stl10, "COUNTS", COUNTS)
    monkeypatch.setattr(stl10, "BLOCK_IMAGES", 8)


def test_the_published_counts_are_expected() -> None:
    assert PUBLISHED == {"train": 5000, "test": 8000, "unlabeled": 100_000}


def test_pixels_labels_and_order_are_those_of_the_files(tmp_path: Path) -> None:
    raw = write_stl10(tmp_path / "raw", COUNTS)
    manifest = prepare_stl10(raw, tmp_path / "data")
    verify_manifest(manifest)
    assert (manifest.dataset, manifest.class_names, manifest.resolution) == ("stl10", STL10_NAMES, (96, 96))
    assert manifest.counts == {"train": (3,) * 10, "test": (2,) * 10, "unlabeled": 7}
    for part, (images, labels) in stl10_sets(COUNTS).items():
        assert np.array_equal(manifest.images(part), images)
        if part != "unlabeled":
            assert np.array_equal(manifest.labels(part), labels)
    assert manifest.mean == (0.4914, 0.4822, 0.4465)
    assert sorted(manifest.source["sha256"]) == [
        "test_X.bin",
        "test_y.bin",
        "train_X.bin",
        "train_y.bin",
        "unlabeled_X.bin",
    ]
    inside = prepare_stl10(raw / "stl10_binary", tmp_path / "again")
    assert inside.files == manifest.files


def test_images_lie_column_by_column(tmp_path: Path) -> None:
    raw = write_stl10(tmp_path / "raw", COUNTS)
    record = np.fromfile(raw / "stl10_binary" / "train_X.bin", np.uint8)[: 3 * 96 * 96]
    image = prepare_stl10(raw, tmp_path / "data").images("train")[0]
    for row, column, channel in ((0, 0, 0), (5, 90, 1), (95, 3, 2)):
        assert image[row, column, channel] == record[channel * 96 * 96 + column * 96 + row]


def test_a_smaller_resolution_is_pillows_antialiased_bilinear(tmp_path: Path) -> None:
    manifest = prepare_stl10(write_stl10(tmp_path / "raw", COUNTS), tmp_path / "data", resolution=32)
    images = stl10_sets(COUNTS)["unlabeled"][0]
    expected = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BILINEAR)) for i in images]
    assert np.array_equal(manifest.images("unlabeled"), np.stack(expected))
    assert manifest.command == "semi-fast prepare stl10 --raw raw --resolution 32 --out data"
    block_means = images[:, 45:48, 45:48].mean(axis=(1, 2))
    assert np.abs(manifest.images("unlabeled")[:, 15, 15] - block_means).max() < 20, "noise of 40 is averaged"


def test_the_command_prepares_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_stl10(tmp_path / "raw", COUNTS)
    (raw / "stl10_binary" / "class_names.txt").unlink()
    assert main(["prepare", "stl10", "--raw", str(raw), "--out", str(tmp_path / "data"), "--resolution", "32"]) == 0
    assert capsys.readouterr().out.startswith("stl10: 10 classes, 32x32, 30 train, 20 test, 7 unlabeled\n")
    load_manifest(tmp_path / "data")


def _labels(path: Path, **changed: int) -> None:
    labels = np.fromfile(path, np.uint8)
    for row, label in changed.items():
        labels[int(row[1:])] = label
    labels.tofile(path)


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing images": ("unlabeled_X.bin", lambda p: p.unlink(), "missing; --raw must hold stl10_binary/ with train_X"),
    "missing labels": ("test_y.bin", lambda p: p.unlink(), "missing"),
    "cut inside a record": ("train_X.bin", lambda p: _cut(p, 1), "must be a multiple of 27648 bytes; got 829439"),
    "cut between records": (
        "unlabeled_X.bin",
        lambda p: _cut(p, 27648),
        "must hold 7 images; got 6: not the",
    ),
    "empty": ("test_X.bin", lambda p: p.write_bytes(b""), "must hold 20 images; got 0"),
    "fewer labels": ("train_y.bin", lambda p: _cut(p, 1), "must hold 30 labels; got 29"),
    "labels out of range": (
        "train_y.bin",
        lambda p: _labels(p, r1=0, r2=11, r5=255),
        "labels must be in 1..10; 3 are not (row 1: 0, row 2: 11, row 5: 255)",
    ),
    "other names": ("class_names.txt", lambda p: p.write_text("airplane\nautomobile\n"), "must name airplane, bird"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file, change, message = BAD[name]
    raw = write_stl10(tmp_path / "raw", COUNTS)
    change(raw / "stl10_binary" / file)
    assert main(["prepare", "stl10", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(raw / "stl10_binary" / file) in line
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("resolution", ["3", "97", "128"])
def test_images_are_not_enlarged(tmp_path: Path, capsys: pytest.CaptureFixture[str], resolution: str) -> None:
    raw = write_stl10(tmp_path / "raw", COUNTS)
    assert main(["prepare", "stl10", "--raw", str(raw), "--out", str(tmp_path / "d"), "--resolution", resolution]) == 2
    assert f"--resolution must be in 4..96; got {resolution}" in capsys.readouterr().err


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    raw = stl10.read_stl10(write_stl10(tmp_path, COUNTS), 96)
    _cut(tmp_path / "stl10_binary" / "unlabeled_X.bin", 1)
    with pytest.raises(ValueError, match=r"unlabeled_X\.bin: became shorter while it was read"):
        list(raw.blocks)


LIMITED = """
import sys
from pathlib import Path
from semi_fast.data_prep.prepare import prepare_stl10
from semi_fast.data_prep.readers import stl10
stl10.COUNTS = {"train": 30, "test": 20, "unlabeled": 8000}
prepare_stl10(Path(sys.argv[1]), Path(sys.argv[2]))
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    raw = write_stl10(tmp_path / "raw", COUNTS)
    with (raw / "stl10_binary" / "unlabeled_X.bin").open("r+b") as file:
        file.truncate(8000 * 27648)  # 221 MB
    command = [sys.executable, "-c", LIMITED, str(raw), str(tmp_path / "data")]
    used = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(used) < 140 * 1024, "KiB; the interpreter with numpy and Pillow takes 40 MiB, a block of images 7"
