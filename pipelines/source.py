"""The contract of a source: uint8 rows by sample id, into a buffer that the step owns."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from semi_fast.manifest import Manifest
from semi_fast.pipelines.resident import ResidentSource


class Source(Protocol):
    """Makes rows; which ones, and in which order, is `sampling`'s business."""

    def read(self, ids: Tensor, out: Tensor) -> None:
        """Write the pixels of sample `ids` (int64 [n], on the device) into `out`, uint8 [n, H, W, 3]."""
        ...


def open_source(name: str, manifest: Manifest, device: torch.device) -> Source:
    """The source called `data.source`; `auto` is resident."""
    return {"auto": ResidentSource, "resident": ResidentSource}[name](manifest, device)
