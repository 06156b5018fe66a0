"""Readers of raw data: each returns a `Raw`, whose pixels come in blocks and may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Raw:
    """A raw data set: what is known before its pixels are read, and the pixels once."""

    dataset: str
    class_names: tuple[str, ...]
    resolution: tuple[int, int]
    labels: dict[str, np.ndarray]
    """int64 [n] of `train` and `test`."""
    num_unlabeled: int
    blocks: Iterator[tuple[str, np.ndarray]]
    """(part, uint8 [m, H, W, 3]) in row order, parts in the order train, test, unlabeled; raises on bad input."""
    source: dict[str, Any]
    """Filled at the latest when `blocks` is exhausted."""
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    """Published mean and std of pixels / 255; None: computed on train."""
    scratch_bytes: int = 0
    """Disk space that reading `blocks` takes beside the output until it ends."""
    blocks_after: Callable[[int], Iterator[tuple[str, np.ndarray]]] | None = None
    """`blocks` without so many first rows, for a preparation that goes on; None where they are not skipped."""
    identity: bytes = b""
    """What decides the pixels of `blocks_after`, without reading them."""


def check_count(path: Path, found: int, published: int, what: str = "images") -> None:
    """ValueError unless a file holds as many as were published: one cut between two of them shows in nothing else."""
    if found != published:
        raise ValueError(f"{path}: must hold {published} {what}; got {found}: not the published file, get it again")


def name_of(path: Path) -> str:
    """The last part of a path for a manifest: its bytes as UTF-8, whatever the locale; what is none is replaced."""
    return os.fsencode(path.name).decode("utf-8", "replace")
