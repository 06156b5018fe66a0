"""Writes `resident/`: plain .npy arrays, made in one pass over the blocks, which need not fit into memory."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers import Writer
from semi_fast.manifest import images_file, labels_file
from semi_fast.sealed_json import fsync_directory

MARGIN_BYTES = 2**20  # array headers and the manifest
ROW_DIGEST_BYTES = 16
SMALLEST_STD = 1 / 255  # of a channel that is the same everywhere; keeps normalisation finite


@dataclass(frozen=True)
class Written:
    """What the manifest says of the arrays written."""

    files: dict[str, dict[str, Any]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    repeated_test_images: int
    """Test images whose pixels are also those of a train or unlabeled image."""


class HashedFile:
    """A new .npy file written front to back, hashed as the bytes pass; hashed alone if it is not to be kept."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, *, kept: bool = True) -> None:
        self.entry = {"shape": list(shape), "dtype": dtype}
        self.hash = hashlib.sha256()
        self.bytes = 0
        self.file: BinaryIO | None = path.open("xb") if kept else None
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        self.expected_bytes = len(header.getvalue()) + math.prod(shape) * np.dtype(dtype).itemsize
        self.write(header.getvalue())

    def write(self, data: bytes) -> None:
        if self.file is not None:
            self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def publish(self) -> dict[str, Any]:
        """Fsync; the manifest's entry. A reader that gave fewer or more rows than it said is a fault of ours."""
        assert self.bytes == self.expected_bytes, (self.entry, self.bytes, self.expected_bytes)
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"bytes": self.expected_bytes, "sha256": self.hash.hexdigest(), **self.entry}


def part_lengths(raw: Raw) -> dict[str, int]:
    return {"train": len(raw.labels["train"]), "test": len(raw.labels["test"]), "unlabeled": raw.num_unlabeled}


def needed_bytes(raw: Raw, *, images: bool = True) -> int:
    """Disk space for `raw` in this layout, a little more than it takes; for labels alone without `images`."""
    pixels = sum(part_lengths(raw).values()) * math.prod(raw.resolution) * 3 * images
    return pixels + sum(labels.nbytes for labels in raw.labels.values()) + MARGIN_BYTES


def write_resident(raw: Raw, root: Path, *, images: bool = True, others: Sequence[Writer] = ()) -> Written:
    """Write `root/resident/`, each file and the directory fsynced; exhausts `raw.blocks`, which `others` see too.

    Without `images` only labels are kept; the pixels are hashed all the same, as what the data set is.
    """
    (root / "resident").mkdir()
    files: dict[str, dict[str, Any]] = {}
    histogram = np.zeros((3, 256), np.int64)
    train_pixels: set[bytes] = set()
    test_pixels: list[bytes] = []
    with ExitStack() as stack:

        def new(name: str, shape: tuple[int, ...], dtype: str, *, kept: bool = True) -> HashedFile:
            out = HashedFile(root / name, shape, dtype, kept=kept)
            if out.file is not None:
                stack.callback(out.file.close)
            return out

        for part, labels in raw.labels.items():
            out = new(labels_file(part), labels.shape, "int64")
            out.write(labels.astype("<i8").tobytes())
            files[labels_file(part)] = out.publish()
        arrays = {
            part: new(images_file(part), (n, *raw.resolution, 3), "uint8", kept=images)
            for part, n in part_lengths(raw).items()
            if n
        }
        for part, block in raw.blocks:
            assert (block.dtype, block.shape[1:]) == (np.uint8, (*raw.resolution, 3)), (block.dtype, block.shape)
            arrays[part].write(block.tobytes())
            for writer in others:
                writer.write(part, block)
            pixels = (hashlib.blake2b(row.tobytes(), digest_size=ROW_DIGEST_BYTES).digest() for row in block)
            (test_pixels.extend if part == "test" else train_pixels.update)(pixels)
            if part == "train":
                histogram += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(3)]
        files |= {images_file(part): out.publish() for part, out in arrays.items()}
    fsync_directory(root / "resident")
    mean, std = raw.statistics or statistics(histogram)
    return Written(files, mean, std, sum(row in train_pixels for row in test_pixels))


def statistics(histogram: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of values / 255 from their counts, int64 [3, 256]; exact up to the last division."""
    values = np.arange(256)
    mean, std = [], []
    for counts in histogram:
        n, total, squares = int(counts.sum()), int(counts @ values), int(counts @ values**2)
        mean.append(total / n / 255)
        std.append(max(math.sqrt(n * squares - total * total) / n / 255, SMALLEST_STD))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
