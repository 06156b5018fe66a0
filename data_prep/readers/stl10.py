"""STL-10 from its published binaries, read in blocks: 5,000 train, 8,000 test and 100,000 unlabeled images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semi_fast.data_prep.readers import Raw, check_count, name_of
from semi_fast.data_prep.readers.kept_chunks import identity

FOLDER = "stl10_binary"
SIDE = 96
RECORD_BYTES = 3 * SIDE * SIDE
BLOCK_IMAGES = 256
COUNTS = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
CLASS_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
NAMES_FILE = "class_names.txt"
STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))  # the papers take those of CIFAR-10


def read_stl10(raw: Path, resolution: int) -> Raw:
    """`raw` holds or is the published folder; rows in published order, resized (bilinear, antialiased) if smaller.

    Sizes and labels are checked here, and nothing is read into memory but labels; ValueError names a missing, damaged
    or cut file.
    """
    folder = raw / FOLDER if (raw / FOLDER).is_dir() else raw
    needed = [f"{part}_X.bin" for part in COUNTS] + ["train_y.bin", "test_y.bin"]
    for name in needed:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; --raw must hold {FOLDER}/ with {', '.join(needed)}")
    _check_names(folder / NAMES_FILE)
    for part, count in COUNTS.items():
        _check_size(folder / f"{part}_X.bin", RECORD_BYTES, count, "images")
    digests: dict[str, str] = {}
    labels = {part: _labels(folder / f"{part}_y.bin", COUNTS[part], digests) for part in ("train", "test")}
    source: dict[str, Any] = {"reader": "stl10 binary", "name": name_of(folder), "sha256": digests}
    return Raw(
        dataset="stl10",
        class_names=CLASS_NAMES,
        resolution=(resolution, resolution),
        labels=labels,
        num_unlabeled=COUNTS["unlabeled"],
        blocks=_blocks(folder, resolution, digests),
        source=source,
        statistics=STATISTICS,
        blocks_after=lambda rows: _blocks(folder, resolution, digests, rows),
        identity=identity(folder, needed, resolution),
    )


def _check_names(path: Path) -> None:
    """The file is not needed; where it is, the labels mean what it says."""
    if path.is_file():
        names = path.read_bytes()[:1000].decode("utf-8", "replace").split()
        if tuple(names) != CLASS_NAMES:
            raise ValueError(f"{path}: must name {', '.join(CLASS_NAMES)}; got {', '.join(names)}; get the file again")


def _check_size(path: Path, record_bytes: int, count: int, what: str) -> None:
    size = path.stat().st_size
    if size % record_bytes:
        raise ValueError(f"{path}: must be a multiple of {record_bytes} bytes; got {size}: truncated, get it again")
    check_count(path, size // record_bytes, count, what)


def _labels(path: Path, count: int, digests: dict[str, str]) -> np.ndarray:
    """int64 [n] in 0..9 of a file of labels in 1..10."""
    _check_size(path, 1, count, "labels")
    content = path.read_bytes()
    digests[path.name] = hashlib.sha256(content).hexdigest()
    labels = np.frombuffer(content, np.uint8).astype(np.int64)
    bad = np.flatnonzero((labels < 1) | (labels > len(CLASS_NAMES)))
    if len(bad):
        shown = ", ".join(f"row {i}: {labels[i]}" for i in bad[:5])
        raise ValueError(f"{path}: labels must be in 1..{len(CLASS_NAMES)}; {len(bad)} are not ({shown})")
    return labels - 1


def _blocks(
    folder: Path, resolution: int, digests: dict[str, str], skipped: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
    """`skipped` first rows are read for the digest alone."""
    for part, count in COUNTS.items():
        path, digest = folder / f"{part}_X.bin", hashlib.sha256()
        with path.open("rb") as file:
            for first in range(0, count, BLOCK_IMAGES):
                wanted = min(BLOCK_IMAGES, count - first) * RECORD_BYTES
                content = file.read(wanted)
                if len(content) != wanted:
                    raise ValueError(f"{path}: became shorter while it was read; prepare again")
                digest.update(content)
                images = _nhwc(content)[skipped:]
                skipped = max(0, skipped - wanted // RECORD_BYTES)
                if len(images):
                    yield part, _resized(images, resolution)
        digests[path.name] = digest.hexdigest()


def _nhwc(content: bytes) -> np.ndarray:
    """Records of channel, column, row -> uint8 [n, 96, 96, 3]."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(records.transpose(0, 3, 2, 1))


def _resized(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 [n, H, W, 3] as Pillow resizes them, which antialiases."""
    if resolution == SIDE:
        return images
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images])
