"""The 1,797 handwritten digits that come with scikit-learn, with a fixed class-balanced test part."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from semi_fast import philox
from semi_fast.data_prep.readers import Raw

DEPTH = 16  # the published grey values are 0..16
TEST_PER_CLASS = 45  # a quarter of the 1,797 images
SPLIT_KEY = 0


def read_digits(resolution: int) -> Raw:
    """8x8 grey images as uint8 `round(255 v / 16)`, resized (bicubic), three equal channels.

    The test part is always the same 45 images of each digit: the first of the class in Philox order. Train keeps file
    order.
    """
    from sklearn.datasets import load_digits  # seconds to import, needed here alone

    bunch = load_digits()
    values, labels = np.asarray(bunch.data), np.asarray(bunch.target, np.int64)  # type: ignore[union-attr]
    grey = np.floor(values.reshape(-1, 8, 8) * 255 / DEPTH + 0.5).astype(np.uint8)
    size = (resolution, resolution)
    images = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grey])
    rows = np.repeat(images[..., None], 3, axis=3)  # [n, H, W, 3]
    test = np.concatenate([_class_order(labels, k)[:TEST_PER_CLASS] for k in range(10)])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Raw(
        dataset="digits",
        class_names=tuple("0123456789"),
        resolution=size,
        labels={"train": labels[train], "test": labels[test]},
        num_unlabeled=0,
        blocks=iter([("train", rows[train]), ("test", rows[test])]),
        source={
            "reader": "digits",
            "name": "sklearn.datasets.load_digits",
            "sha256": hashlib.sha256(grey.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        },
    )


def _class_order(labels: np.ndarray, k: int) -> np.ndarray:
    return philox.shuffled(np.flatnonzero(labels == k), SPLIT_KEY, philox.SPLIT, 0)
