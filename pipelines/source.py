"""The contract of a source: uint8 rows by sample id, into a buffer that the step owns; and which source a run has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from semi_fast.pipelines.host import HostSource, MappedRows
from semi_fast.pipelines.resident import ResidentSource
from semi_fast.prepared.manifest import Manifest, formats

FITS = 0.5
"""Of the free memory: what the pixels of a resident source may take."""
Order = Callable[[int], np.ndarray]


class Source(Protocol):
    """Makes rows; which ones, and in which order, is `sampling`'s business."""

    description: str
    """One line: what it is, where the pixels are, and why."""

    def fetch(self, step: int, out: Tensor) -> None:
        """Before a step: write the pixels of its rows into `out`, uint8 [n, H, W, 3], where the host must do that."""
        ...

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Within the step: write the pixels of `ids`, int64 [n] on the device, where the device can do that alone."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


def open_source(name: str, manifest: Manifest, device: torch.device, order: Order, *, threads: int) -> Source:
    """The source called `data.source` of a run whose step t reads the sample ids `order(t)`.

    `auto` is the pixels in the device's memory where they take at most half of what is free; else the resident arrays
    on the disk, or the container that there is. Raises ValueError for a format that was not prepared, RuntimeError for
    a library that is missing.
    """
    have = formats(manifest)
    chosen = have[0] if name == "auto" else name
    if chosen not in have:
        raise ValueError(
            f"data.source is {name}, but {manifest.root} holds {', '.join(have)}: prepare it with --formats"
        )
    if chosen == "ffcv":
        from semi_fast.pipelines.ffcv import FfcvRows

        return HostSource(FfcvRows(manifest, order, threads=threads), device, f"ffcv, {threads} threads")
    if chosen == "dali":
        from semi_fast.pipelines.dali import DaliRows

        rows = DaliRows(manifest, order, threads=threads, device=device)
        gpu = rows.decodes_on_gpu
        decoder = "the GPU decodes" if gpu else f"{threads} threads"
        return HostSource(rows, device, f"dali, {decoder}", on_device=gpu)
    needed = sum(manifest.length(part) for part in ("train", "unlabeled")) * 3 * int(np.prod(manifest.resolution))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    sizes = f"{needed / 2**20:,.0f} MiB of pixels, {free / 2**20:,.0f} MiB free on {device.type}"
    if needed <= FITS * free:
        return ResidentSource(manifest, device, f"resident in device memory: {sizes}")
    return HostSource(MappedRows(manifest, order), device, f"resident on the disk, read ahead: {sizes}, at most half")


def read_part(manifest: Manifest, part: str, *, threads: int, rows: np.ndarray | None = None) -> np.ndarray:
    """uint8 [n, H, W, 3] of a whole part in order, or of some of its `rows`, from the first format; verified."""
    have = formats(manifest)[0]
    if have == "ffcv":
        from semi_fast.pipelines import ffcv

        return ffcv.read_part(manifest, part, rows)
    if have == "dali":
        from semi_fast.pipelines import dali

        images = dali.read_part(manifest, part, threads=threads)
    else:
        images = manifest.verified_images(part) if rows is None else manifest.images(part)
    return images if rows is None else images[rows]
