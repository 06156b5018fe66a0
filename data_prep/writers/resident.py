"""Writes `resident/`: plain .npy arrays, made in one pass over the blocks, which need not fit into memory."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers import Writer
from semi_fast.disk import fsync_directory
from semi_fast.prepared.hashed_file import HashedFile
from semi_fast.prepared.manifest import images_file, labels_file

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


class NpyFile:
    """An .npy file written front to back; hashed alone if it is not to be kept."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, *, kept: bool = True) -> None:
        self.entry = {"shape": list(shape), "dtype": dtype}
        self.hash = hashlib.sha256()
        self.file = HashedFile(path) if kept else None
        header = npy_header(shape, dtype)
        self.bytes, self.expected_bytes = 0, len(header) + math.prod(shape) * np.dtype(dtype).itemsize
        self.write(header)

    def write(self, data: bytes | memoryview) -> None:
        self.bytes += len(data)
        if self.file is None:
            self.hash.update(data)
        else:
            self.file.write(data)

    def finish(self) -> dict[str, Any]:
        """Force it to the disk; the manifest's entry. A reader that gave fewer or more rows than it said is a fault of
        ours."""
        assert self.bytes == self.expected_bytes, (self.entry, self.bytes, self.expected_bytes)
        about = {"bytes": self.bytes, "sha256": self.hash.hexdigest()} if self.file is None else self.file.finish()
        return about | self.entry


def npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """What precedes the values of an array that lies row by row."""
    out = io.BytesIO()
    entries = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, entries)
    return out.getvalue()


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
    (root / "resident").mkdir(exist_ok=True)
    files: dict[str, dict[str, Any]] = {}
    histogram = np.zeros((3, 256), np.int64)
    train_pixels: set[bytes] = set()
    test_pixels: list[bytes] = []
    threads = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))

        def new(name: str, shape: tuple[int, ...], dtype: str, *, kept: bool = True) -> NpyFile:
            out = NpyFile(root / name, shape, dtype, kept=kept)
            if out.file is not None:
                stack.callback(out.file.close)
            return out

        for part, labels in raw.labels.items():
            out = new(labels_file(part), labels.shape, "int64")
            out.write(labels.astype("<i8").tobytes())
            files[labels_file(part)] = out.finish()
        arrays = {
            part: new(images_file(part), (n, *raw.resolution, 3), "uint8", kept=images)
            for part, n in part_lengths(raw).items()
            if n
        }
        for part, block in raw.blocks:
            assert (block.dtype, block.shape[1:]) == (np.uint8, (*raw.resolution, 3)), (block.dtype, block.shape)
            pieces = [pool.submit(_row_digests, piece) for piece in np.array_split(block, threads)]
            arrays[part].write(np.ascontiguousarray(block).data.cast("B"))
            for writer in others:
                writer.write(part, block)
            for piece in pieces:
                (test_pixels.extend if part == "test" else train_pixels.update)(piece.result())
            if part == "train" and raw.statistics is None:
                histogram += [np.bincount(block[..., channel].ravel(), minlength=256) for channel in range(3)]
        files |= {images_file(part): out.finish() for part, out in arrays.items()}
    fsync_directory(root / "resident")
    mean, std = raw.statistics or statistics(histogram)
    return Written(files, mean, std, sum(row in train_pixels for row in test_pixels))


def _row_digests(rows: np.ndarray) -> list[bytes]:
    return [hashlib.blake2b(row.tobytes(), digest_size=ROW_DIGEST_BYTES).digest() for row in rows]


def statistics(histogram: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of values / 255 from their counts, int64 [3, 256]; exact up to the last division."""
    values = np.arange(256)
    mean, std = [], []
    for counts in histogram:
        n, total, squares = int(counts.sum()), int(counts @ values), int(counts @ values**2)
        mean.append(total / n / 255)
        std.append(max(math.sqrt(n * squares - total * total) / n / 255, SMALLEST_STD))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
