"""Rows from TFRecord shards through a pipeline of NVIDIA DALI that decodes in our order and does nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semi_fast.prepared.manifest import Manifest, check_container
from semi_fast.prepared.tfrecord import Records, index_path, open_records

INPUT = "images"
INSTALL = "pip install 'semi-fast[dali]'"
STEPS_AHEAD = 2  # batches in the pipeline: the one that is handed out, and the next
PART_ROWS = 256  # at once, of a whole part
CPU = torch.device("cpu")
PNG_OPENING = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG_OPENING = b"\xff\xd8\xff"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that are followed by height and width

Batch = np.ndarray | list[np.ndarray]
"""What the pipeline is given: raw uint8 [n, H, W, 3], or the n encoded images."""


class DaliRows:
    """The rows of every step, decoded ahead by DALI's threads; PNG and JPEG by `device` where that is a GPU.

    A GPU's JPEG decoder may round otherwise than a CPU's: lossless images are the same from both.

    Every step has as many rows as the first one fetched. An error in the rows of a step arrives at that step or, as
    they are decoded ahead, one before it; the next fetch begins anew. On a GPU this has not been run yet.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Callable[[int], np.ndarray],
        *,
        threads: int,
        device: torch.device = CPU,
    ):
        _dali()
        self.shards = Shards(manifest, ("train", "unlabeled"))
        self.decodes_on_gpu = device.type == "cuda" and not self.shards.raw
        self.order, self.threads, self.device = order, threads, device if self.decodes_on_gpu else CPU
        self.rows: int | None = None
        self.pipeline: Any = None
        self.next_step = 0

    def fetch(self, step: int) -> np.ndarray:
        """uint8 [n, H, W, 3]: the pixels of the sample ids `order(step)`, a copy in host memory."""
        return self._decoded(step).cpu().numpy().copy()

    def fetch_into(self, step: int, out: Tensor) -> None:
        """As `fetch`, into uint8 [n, H, W, 3] on the device."""
        pixels = self._decoded(step)
        assert (out.dtype, out.shape) == (pixels.dtype, pixels.shape), (out.dtype, out.shape, pixels.shape)
        out.copy_(pixels)
        if pixels.is_cuda:
            torch.cuda.current_stream(pixels.device).synchronize()  # then DALI may have the memory of `pixels` back

    def close(self) -> None:
        """Ends the pipeline and its threads; a later fetch would begin anew."""
        self.pipeline = None

    def _decoded(self, step: int) -> Tensor:
        """The rows in DALI's memory, valid for as long as the tensor is held."""
        try:
            if self.pipeline is None or step != self.next_step:
                self.close()
                ids = self.order(step)
                self.rows = self.rows or len(ids)
                self.pipeline = _pipeline(self.shards, self.rows, self.threads, self.device, depth=STEPS_AHEAD)
                self._feed(step, ids)
            self._feed(step + 1, self.order(step + 1))
            pixels = _run(self.pipeline)
        except BaseException:
            self.close()  # what is in the pipeline is no longer what the next step needs
            raise
        self.next_step = step + 1
        return pixels

    def _feed(self, step: int, ids: np.ndarray) -> None:
        if len(ids) != self.rows:
            raise ValueError(f"every step must have {self.rows} rows; step {step} has {len(ids)}")
        self.pipeline.feed_input(INPUT, self.shards.batch(ids))


def read_part(manifest: Manifest, part: str, *, threads: int) -> np.ndarray:
    """uint8 [n, H, W, 3]: a whole part in order, every image decoded once."""
    _dali()
    shards = Shards(manifest, (part,))
    rows = np.empty((len(shards), *manifest.resolution, 3), np.uint8)
    pipeline = _pipeline(shards, PART_ROWS, threads, CPU, depth=1)
    for start in range(0, len(rows), PART_ROWS):
        end = min(start + PART_ROWS, len(rows))
        pipeline.feed_input(INPUT, shards.batch(np.arange(start, end)))
        rows[start:end] = _run(pipeline).numpy()
    return rows


class Shards:
    """The images of some parts, one after the other, in memory-mapped shards that are as the manifest says."""

    def __init__(self, manifest: Manifest, parts: tuple[str, ...]):
        """ValueError, before a shard is read for its images, when one is missing, changed or damaged."""
        self.resolution = manifest.resolution
        self.shards: list[Records] = []
        formats = set()
        for part in parts:
            first = 0
            for name, entry in _shards_of(manifest, part):
                if entry["first"] != first:
                    raise ValueError(f"{manifest.root / name}: must begin with row {first} of {part}; prepare again")
                formats.add(entry["image_format"])
                self.shards.append(_open_shard(manifest, name))
                first += entry["rows"]
            if first != manifest.length(part):
                raise ValueError(
                    f"{manifest.root}: the shards of {part} must hold {manifest.length(part)} rows, they hold {first}; "
                    "prepare it again with --formats"
                )
        if len(formats) > 1:
            raise ValueError(f"{manifest.root}: shards must be of one image format, not {formats}; prepare again")
        self.raw = formats <= {"raw"}
        self.starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, ids: np.ndarray) -> Batch:
        """The images of these numbers, as the pipeline takes them."""
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= len(self):
            got = f"{ids.min()}..{ids.max()}" if len(ids) else "none"
            raise ValueError(f"sample ids must be in 0..{len(self) - 1}, at least one; got {got}")
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        rows = ids - self.starts[shards]
        images = [self.shards[shard].image(row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        if self.raw:
            return np.stack(images).reshape(-1, *self.resolution, 3)
        for i, image in zip(ids, images, strict=True):
            if encoded_size(image.data) != self.resolution:
                raise ValueError(f"image {i} must be a PNG or JPEG of {self.resolution} pixels: damaged, prepare again")
        return images


def encoded_size(image: memoryview) -> tuple[int, int] | None:
    """Height and width that a PNG or JPEG announces, and for which its decoder takes memory; None for anything else."""
    if image[:16] == PNG_OPENING and len(image) >= 24:
        width, height = struct.unpack_from(">II", image, 16)
        return height, width
    at = 2 if image[:3] == JPEG_OPENING else len(image)
    while at + 9 <= len(image) and image[at] == 0xFF:
        if image[at + 1] in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", image, at + 5)
            return height, width
        at += 2 + int.from_bytes(image[at + 2 : at + 4], "big")
    return None


def _shards_of(manifest: Manifest, part: str) -> list[tuple[str, dict[str, Any]]]:
    entries = manifest.containers.items()
    mine = [(n, e) for n, e in entries if e["format"] == "dali" and e["part"] == part and n.endswith(".tfrecord")]
    return sorted(mine, key=lambda named: named[1]["first"])


def _open_shard(manifest: Manifest, name: str) -> Records:
    path, entry = check_container(manifest, name), manifest.containers[name]
    index = str(index_path(path).relative_to(manifest.root))
    if index not in manifest.containers:
        raise ValueError(f"{path}: the manifest must name its index {index}; prepare again")
    check_container(manifest, index)
    shard = open_records(path, rows=entry["rows"], num_bytes=entry["bytes"])
    row_bytes = 3 * manifest.resolution[0] * manifest.resolution[1]
    if entry["image_format"] == "raw" and (shard.images[:, 1] != row_bytes).any():
        raise ValueError(f"{path}: every image must have {row_bytes} bytes; damaged, prepare again")
    return shard


def _pipeline(shards: Shards, rows: int, threads: int, device: torch.device, *, depth: int) -> Any:
    """A DALI pipeline from images as they are stored to their pixels in the memory of `device`.

    It is fed, not given a callback: a cycle through DALI would keep an abandoned one, and the shards, in memory.
    """
    dali = _dali()
    cuda = device.type == "cuda"
    pipeline = dali.Pipeline(rows, threads, device.index if cuda else None, prefetch_queue_depth=depth)
    with pipeline:
        images = dali.fn.external_source(name=INPUT, batch=True, dtype=dali.types.UINT8, ndim=3 if shards.raw else 1)
        if not shards.raw:
            where = "mixed" if cuda else "cpu"
            images = dali.fn.decoders.image(images, device=where, output_type=dali.types.RGB, adjust_orientation=False)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _run(pipeline: Any) -> Tensor:
    """Starts what was fed since the last call, `depth` batches before the first one; the pixels of the oldest batch."""
    pipeline.schedule_run()
    (pixels,) = pipeline.outputs()
    return torch.from_dlpack(pixels.as_tensor())


def _dali() -> Any:
    try:
        import nvidia.dali as dali  # pyright: ignore[reportMissingImports], an extra
    except ImportError as error:
        raise RuntimeError(f"data.source=dali needs NVIDIA DALI ({error}); install it with: {INSTALL}") from error
    return dali
