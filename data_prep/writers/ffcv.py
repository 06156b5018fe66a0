"""Writes `ffcv/`: one .beton file for each part, in FFCV's format but without FFCV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from semi_fast.data_prep.readers import Raw
from semi_fast.disk import fsync_directory
from semi_fast.prepared.beton import BetonFile, beton_file, layout_of

NO_LABEL = -1


class FfcvWriter:
    """See `writers.Writer`. The field `index` is the sample id: `unlabeled` goes on where `train` ends."""

    def __init__(self, raw: Raw, root: Path) -> None:
        self.root, self.resolution, self.columns = root, raw.resolution, columns(raw)
        self.files: dict[str, BetonFile] = {}
        (root / "ffcv").mkdir(exist_ok=True)

    def write(self, part: str, block: np.ndarray) -> None:
        if part not in self.files:
            self.files[part] = BetonFile(self.root / beton_file(part), *self.columns[part], self.resolution)
        self.files[part].write(block)

    def finish(self) -> dict[str, dict[str, Any]]:
        assert self.files.keys() == self.columns.keys(), self.files.keys()
        entries = {
            beton_file(part): {"format": "ffcv", "part": part, "rows": file.rows, **file.finish()}
            for part, file in self.files.items()
        }
        fsync_directory(self.root / "ffcv")
        return entries

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def columns(raw: Raw) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels and sample ids, int64 [rows], of every part that has rows."""
    train, test, unlabeled = raw.labels["train"], raw.labels["test"], raw.num_unlabeled
    of_parts = {
        "train": (train, np.arange(len(train))),
        "test": (test, np.arange(len(test))),
        "unlabeled": (np.full(unlabeled, NO_LABEL), len(train) + np.arange(unlabeled)),
    }
    return {part: (labels, ids) for part, (labels, ids) in of_parts.items() if len(ids)}


def needed_bytes(raw: Raw) -> int:
    """Disk space for `raw` in this format."""
    return sum(layout_of(len(ids), raw.resolution).file_bytes for _, ids in columns(raw).values())
