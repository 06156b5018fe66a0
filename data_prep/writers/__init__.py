"""Writers of prepared pixels: each is given the blocks of a `Raw` in order and fills its folder of an unpublished
directory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
    """One format of a data set in the making."""

    def write(self, part: str, block: np.ndarray) -> None:
        """The next rows of `train`, `test` or `unlabeled`, uint8 [m, H, W, 3]; parts come one after the other."""
        ...

    def finish(self) -> dict[str, dict[str, Any]]:
        """Force everything to the disk; the manifest's entry of every file by its path relative to the root:
        `format`, `part`, `rows`, `bytes`, `sha256`, and what a reader of the format must know."""
        ...

    def close(self) -> None:
        """Let go of open files, after an error too."""
        ...
