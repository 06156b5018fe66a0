"""Writes `dali/`: TFRecord shards with the index files of NVIDIA DALI, which is not needed to write them."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers.resident import part_lengths
from semi_fast.disk import fsync_directory
from semi_fast.prepared.tfrecord import INDEX_LINE_BYTES, RECORD_OVERHEAD_BYTES, RecordFile

FOLDER = "dali"
SHARD_ROWS = 2**15  # 100 MiB of 32x32 pixels
JPEG_QUALITY = 95
NO_LABEL = -1  # of unlabeled images
IMAGE_FORMATS = ("raw", "png", "jpeg")


class DaliWriter:
    """The `Writer` of TFRecord shards: `dali/PART-SHARD-of-SHARDS.tfrecord`, and `.idx` beside each.

    `raw` stores the pixels row by row, `png` compresses them without loss, `jpeg` with loss (`quality`, colours at full
    resolution). A record's index is its sample id; an image of `test`, which has none, has its row there.
    """

    def __init__(
        self,
        raw: Raw,
        root: Path,
        *,
        image_format: str = "raw",
        quality: int = JPEG_QUALITY,
        shard_rows: int = SHARD_ROWS,
    ):
        _check_format(image_format)
        if not 1 <= quality <= 100:
            raise ValueError(f"the JPEG quality must be in 1..100; got {quality}")
        if shard_rows < 1:
            raise ValueError(f"a shard must have at least one row; got {shard_rows}")
        self.folder = root / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.image_format, self.quality, self.shard_rows = image_format, quality, shard_rows
        self.labels, self.lengths = raw.labels, part_lengths(raw)
        self.written = dict.fromkeys(self.lengths, 0)
        self.entries: dict[str, dict[str, Any]] = {}
        self.shard: RecordFile | None = None
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # Pillow encodes without the interpreter's lock

    def write(self, part: str, block: np.ndarray) -> None:
        """See `Writer`."""
        labels = self.labels.get(part)
        first_id = self.lengths["train"] if part == "unlabeled" else 0
        for image in self.pool.map(self._encoded, block):
            row = self.written[part]
            assert row < self.lengths[part], (part, self.lengths)
            shard = self._shard(part, row)
            shard.write(image, NO_LABEL if labels is None else int(labels[row]), first_id + row)
            self.written[part] = row + 1
            if (row + 1) % self.shard_rows == 0 or row + 1 == self.lengths[part]:
                self._finish_shard(part)

    def finish(self) -> dict[str, dict[str, Any]]:
        """See `Writer`; `first` is the first row of a shard, `image_format` what its images are."""
        assert self.written == self.lengths, (self.written, self.lengths)
        fsync_directory(self.folder)
        return self.entries

    def close(self) -> None:
        """See `Writer`."""
        self.pool.shutdown(cancel_futures=True)
        if self.shard is not None:
            self.shard.close()

    def _shard(self, part: str, row: int) -> RecordFile:
        if self.shard is None:
            number, shards = row // self.shard_rows, -(-self.lengths[part] // self.shard_rows)
            self.shard = RecordFile(self.folder / f"{part}-{number:05d}-of-{shards:05d}.tfrecord")
        return self.shard

    def _finish_shard(self, part: str) -> None:
        shard, self.shard = self.shard, None
        assert shard is not None
        rows = len(shard.lines)
        about = {
            "format": "dali",
            "part": part,
            "rows": rows,
            "first": self.written[part] - rows,
            "image_format": self.image_format,
        }
        try:
            self.entries |= {f"{FOLDER}/{name}": about | entry for name, entry in shard.finish().items()}
        finally:
            shard.close()

    def _encoded(self, pixels: np.ndarray) -> bytes:
        if self.image_format == "raw":
            return pixels.tobytes()
        out = io.BytesIO()
        if self.image_format == "png":
            Image.fromarray(pixels).save(out, "PNG")
        else:
            Image.fromarray(pixels).save(out, "JPEG", quality=self.quality, subsampling=0)
        return out.getvalue()


def needed_bytes(raw: Raw, image_format: str) -> int:
    """Disk space for `raw` in this format at most; of that, CIFAR-10 takes 98 % as raw, 57 % as png, 21 % as jpeg."""
    _check_format(image_format)
    height, width = raw.resolution
    image = {
        "raw": 3 * height * width,
        "png": (3 * width + 1) * height * 9 // 8 + 512,  # deflate's worst case, chunks
        "jpeg": 6 * (-(-height // 8) * -(-width // 8)) * 64 + 1024,  # 16 bits for each coefficient, tables
    }[image_format]
    return sum(part_lengths(raw).values()) * (image + RECORD_OVERHEAD_BYTES + INDEX_LINE_BYTES)


def _check_format(image_format: str) -> None:
    if image_format not in IMAGE_FORMATS:
        raise ValueError(f"the image format must be one of {', '.join(IMAGE_FORMATS)}; got {image_format!r}")
