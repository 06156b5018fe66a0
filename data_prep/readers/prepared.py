"""A prepared data set read again, with the rows of one split alone: what a long-tailed container holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from semi_fast.data_prep.readers import Raw
from semi_fast.prepared.manifest import Manifest, Split

BLOCK_BYTES = 2**24


def read_prepared(manifest: Manifest, split: Split) -> Raw:
    """The images that `split` names, in the order of their sample ids, and the whole test set.

    Mean and standard deviation stay those of the whole training set, as in the papers.
    """
    train, unlabeled = kept_ids(manifest, split)
    parts = {
        "train": train,
        "test": np.arange(manifest.length("test")),
        "unlabeled": unlabeled - manifest.length("train"),
    }
    return Raw(
        dataset=manifest.dataset,
        class_names=manifest.class_names,
        resolution=manifest.resolution,
        labels={"train": manifest.labels("train")[train], "test": manifest.labels("test").copy()},
        num_unlabeled=len(unlabeled),
        blocks=_blocks(manifest, parts),
        source={**manifest.source, "rows_of": {"data_sha256": manifest.data_sha256, "split_sha256": split.sha256}},
        statistics=(manifest.mean, manifest.std),
    )


def kept_ids(manifest: Manifest, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids of the split in the train part, and in the unlabeled part; int64, ascending."""
    ids = np.unique(np.concatenate([split.labeled, split.unlabeled, split.validation]))
    inside = ids < manifest.length("train")
    return ids[inside], ids[~inside]


def renumbered(split: Split, manifest: Manifest, smaller: Manifest) -> Split:
    """The split of `manifest` in the sample ids of `smaller`, which `read_prepared` made of it; not sealed."""
    ids = np.concatenate(kept_ids(manifest, split))
    labeled, unlabeled, validation = (
        np.searchsorted(ids, x) for x in (split.labeled, split.unlabeled, split.validation)
    )
    return replace(
        split,
        data_sha256=smaller.data_sha256,
        labeled=labeled,
        unlabeled=unlabeled,
        validation=validation,
        sha256="",
    )


def _blocks(manifest: Manifest, parts: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    rows = max(1, BLOCK_BYTES // (3 * manifest.resolution[0] * manifest.resolution[1]))
    for part, ids in parts.items():
        images = manifest.images(part)
        for start in range(0, len(ids), rows):
            yield part, images[ids[start : start + rows]]
