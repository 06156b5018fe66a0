"""Configuration of the data set, the batch and the views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which prepared data set is read, and how."""

    path: str = ""
    """Directory that `semi-fast prepare` wrote."""
    source: Literal["auto", "resident", "ffcv", "dali"] = "auto"
    """How rows reach the device: from its own memory (resident; read ahead from the disk where they do not fit), or by
    FFCV or DALI from their containers. `auto` is resident if it was prepared, else the container that there is."""
    threads: int | None = None
    """Threads that read and decode (ffcv, dali); empty: all cores, divided by the processes."""


@dataclass(frozen=True)
class BatchConfig:
    """The global batch of one step; several processes divide it."""

    labeled: int = 64
    """Labeled images per step (B)."""
    unlabeled_ratio: int = 1
    """Unlabeled images per labeled image (mu): U = B * mu."""


@dataclass(frozen=True)
class AugmentConfig:
    """The weak and strong views."""

    flip: bool = True
    """Mirror left and right with probability 1/2; no for digits and text."""
    pad: int | None = None
    """Pixels of padding before the random crop; empty: an eighth of the shorter side."""
    labeled_padding: Literal["reflect", "zero"] = "reflect"
    """What the padding of labeled images shows: `zero` is black (ImageNet-127); other views are always reflected."""
    cutout: int = 16
    """Side of the cutout box of the strong views, in pixels; 0 for none."""
    operations: int = 2
    """RandAugment operations drawn for each strong view (N)."""
