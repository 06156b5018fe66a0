"""The classes of ImageNet-127: which of its 127 super-classes each of the 1000 synsets of ILSVRC-2012 belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from semi_fast.sealed_json import read_json

TABLE_FILE = Path(__file__).parents[1] / "imagenet127.json"
# Of the downsampled train images / 255, as published with the protocol (32 and 64 pixels alike).
STATISTICS = ((0.48109809, 0.45747185, 0.40785507), (0.26040889, 0.2532126, 0.26820634))


@dataclass(frozen=True)
class Table:
    """Which of the 127 classes each of the 1000 synsets belongs to; row i is label i + 1 of the development kit."""

    class_names: tuple[str, ...]
    class_wnids: tuple[str, ...]
    synsets: tuple[str, ...]
    class_of: np.ndarray
    """int64 [1000]."""
    train_counts: np.ndarray
    """int64 [1000]: train images that ILSVRC-2012 has of each synset."""

    @property
    def train_images(self) -> int:
        return int(self.train_counts.sum())


@cache
def load_table() -> Table:
    document = read_json(TABLE_FILE)
    wnids, names = zip(*document["classes"], strict=True)
    synsets, class_of, counts = zip(*document["synsets"], strict=True)
    return Table(names, wnids, synsets, np.array(class_of, np.int64), np.array(counts, np.int64))


def subset_note(train_labels: int, classes: int) -> dict[str, str]:
    """What the manifest's source says of anything smaller than ILSVRC-2012; nothing of all of it."""
    table = load_table()
    if (train_labels, classes) == (table.train_images, len(table.class_names)):
        return {}
    return {
        "subset": f"{classes} of {len(table.class_names)} classes, {train_labels} of {table.train_images} train images"
    }


@cache
def class_by_wnid() -> dict[str, int]:
    """The class of every synset, and of every super-class's own WordNet id."""
    table = load_table()
    return dict(zip(table.class_wnids, range(len(table.class_wnids)), strict=True)) | dict(
        zip(table.synsets, table.class_of.tolist(), strict=True)
    )
