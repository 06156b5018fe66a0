"""The released code's loaders: torch DataLoaders over images in host memory, each image through Pillow on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.pipeline_cases import ENDLESS, Samples
from benchmarks.reference import pillow_views
from semi_fast.pipelines.source import read_part
from semi_fast.prepared.manifest import Manifest, Split
from semi_fast.schema.config import Config

EVALUATED = 64  # images of a forward of the released evaluation
STRONG_VIEWS = 2
Loaded = tuple[tuple[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]
"""What a step takes: ([labeled], labels) and ([weak, strong_0, strong_1], -1 for every row)."""


def check_rendered(config: Config) -> None:
    """Raise ValueError for views that Pillow does not make here."""
    if config.augment.operations != 2 or config.augment.labeled_padding != "reflect":
        raise ValueError(
            "augment.operations must be 2 and augment.labeled_padding reflect for the reference loop; got "
            f"{config.augment.operations} and {config.augment.labeled_padding}"
        )


def train_batches(config: Config, manifest: Manifest, split: Split, *, workers: int) -> Iterator[Loaded]:
    """Endless labeled and unlabeled batches, from two loaders with `workers` processes each.

    The released code makes new loaders, with new processes, each time a set has been gone through (semi.md 7.1: every
    19 steps); these go on, which is quicker. Their processes end when the last reference to the iterator goes.
    """
    options, side = config.augment, min(manifest.resolution)
    pad = side // 8 if options.pad is None else options.pad
    normal = {"pad": pad, "cutout": options.cutout, "mean": manifest.mean, "std": manifest.std}
    random = Random(config.seed)

    def weak(image: np.ndarray) -> Tensor:
        view = pillow_views.draw_weak(random, pad, flip=options.flip)
        return pillow_views.render(Image.fromarray(image), view, **normal)

    def strong(image: np.ndarray) -> Tensor:
        view = pillow_views.draw_strong(random, side, pad, options.cutout, flip=options.flip)
        return pillow_views.render(Image.fromarray(image), view, **normal)

    parts = [part for part in ("train", "unlabeled") if manifest.length(part)]
    images = np.concatenate([read_part(manifest, part, threads=1) for part in parts])
    sets = (
        Samples(images, manifest.labels("train"), split.labeled, (weak,)),
        Samples(images, np.full(len(images), -1), split.unlabeled, (weak, *[strong] * STRONG_VIEWS)),
    )
    rows = config.batch.labeled, config.batch.labeled * config.batch.unlabeled_ratio
    both = [
        iter(endless(samples, count, config.seed, workers, lambda _: random.seed(torch.initial_seed())))
        for samples, count in zip(sets, rows, strict=True)
    ]
    return zip(*both, strict=True)


def endless(samples: Samples, rows: int, seed: int, workers: int, reseed: Callable[[int], Any]) -> DataLoader[Any]:
    """Every sample once, in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        samples,
        rows,
        sampler=RandomSampler(samples, num_samples=ENDLESS, generator=generator),
        num_workers=workers,
        worker_init_fn=reseed,
        generator=generator,
        multiprocessing_context="fork" if workers else None,
    )


def test_batches(manifest: Manifest, *, workers: int) -> DataLoader[Any]:
    """The test set in order, one image at a time."""

    def plain(image: np.ndarray) -> Tensor:
        view = pillow_views.View(flip=False, crop=(0, 0))
        return pillow_views.render(Image.fromarray(image), view, pad=0, cutout=0, mean=manifest.mean, std=manifest.std)

    images, labels = read_part(manifest, "test", threads=1), manifest.labels("test")
    return DataLoader(
        Samples(images, labels, np.arange(len(labels)), (plain,)),
        EVALUATED,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
