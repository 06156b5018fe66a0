"""The resident source: every pixel of the training pool in the memory of the training device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from semi_fast.prepared.manifest import Manifest


class ResidentSource:
    """uint8 [samples, H, W, 3]: the rows of `train`, then those of `unlabeled`."""

    def __init__(self, manifest: Manifest, device: torch.device, description: str):
        self.description = description
        parts = [manifest.verified_images(part) for part in ("train", "unlabeled")]
        self.images = torch.empty(sum(map(len, parts)), *manifest.resolution, 3, dtype=torch.uint8, device=device)
        start = 0
        for part in parts:
            for rows in np.array_split(part, max(1, part.nbytes // 2**28)):  # at most about 256 MiB on the way
                self.images[start : start + len(rows)].copy_(torch.from_numpy(np.array(rows)))
                start += len(rows)

    def fetch(self, step: int, out: Tensor) -> None:
        """Nothing to do on the host."""

    def read(self, ids: Tensor, out: Tensor) -> None:
        """See `source.Source`."""
        torch.index_select(self.images, 0, ids, out=out)

    def close(self) -> None:
        """Nothing to end."""
