"""The pipelines that `benchmarks.pipelines` compares: from stored images to a step's normalised views, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from benchmarks.case import SEED, Goal
from benchmarks.reference import pillow_views
from semi_fast.batch import RowLayout, Rows
from semi_fast.data_prep.formats import Formats
from semi_fast.data_prep.prepare import publish
from semi_fast.data_prep.readers import Raw
from semi_fast.loop.sampling import Batches
from semi_fast.pipelines.augment import Augmenter
from semi_fast.pipelines.host import HostRows
from semi_fast.pipelines.source import open_source, read_part
from semi_fast.prepared.manifest import Manifest, formats, load_manifest
from semi_fast.schema.data import AugmentConfig

LAYOUT = RowLayout(labeled=64, unlabeled=64, strong_views=2)
CPU = torch.device("cpu")
OPTIONS = AugmentConfig()
LEVEL = 10  # of the libraries' own RandAugment, of 30
EVERY = 10  # such image has a label
ENDLESS = 10**9
CLASSES = 10
PARTS = ("train", "test", "unlabeled")
Make = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Data:
    """One data set, prepared twice: DALI's shards hold raw pixels or PNG files."""

    raw: Manifest
    png: Manifest

    @property
    def side(self) -> int:
        return min(self.raw.resolution)

    @property
    def pad(self) -> int:
        return self.side // 8

    @property
    def cutout_share(self) -> float:
        """Of the image's area."""
        return (OPTIONS.cutout / self.side) ** 2

    def train(self) -> np.ndarray:
        """uint8 [n, H, W, 3], in memory."""
        return np.array(self.raw.verified_images("train"))

    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids of the labeled and of the unlabeled stream, both of `train`: int64 [n] each."""
        everything = np.arange(self.raw.length("train"))
        return everything[::EVERY], everything

    def batches(self) -> Batches:
        return Batches(*self.ids(), seed=SEED, labeled_rows=LAYOUT.labeled, unlabeled_rows=LAYOUT.unlabeled)


@dataclass(frozen=True)
class Pipeline:
    """A row of the benchmark."""

    label: str
    open: Callable[[Data], Generator[Any]]
    """Endless; each value is what one step needs. Closing it ends its threads and processes."""
    libraries: tuple[str, ...]
    """Distributions that do the work."""
    unit: str = "views"
    """What is counted: the views of a step, or the images where nothing but decoding is done."""
    goal: Goal | None = None
    ours: bool = False

    @property
    def per_step(self) -> int:
        return LAYOUT.total if self.unit == "views" else LAYOUT.images

    @property
    def versions(self) -> str | None:
        """Of the libraries; None if one is not installed."""
        try:
            return ", ".join(f"{name} {version(name)}" for name in self.libraries)
        except PackageNotFoundError:
            return None


class Samples(Dataset[Any]):
    """Images in memory, one at a time, as (views, label)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, ids: np.ndarray, makers: tuple[Make, ...]) -> None:
        self.images, self.labels, self.ids, self.makers = images, labels, ids, makers

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> tuple[tuple[Tensor, ...], int]:
        sample = self.ids[row]
        return tuple(make(self.images[sample]) for make in self.makers), int(self.labels[sample])


def loaders(data: Data, weak: Make, strong: Make, *, workers: int, reseed: Callable[[int], Any]) -> Generator[Any]:
    """The batches of two torch DataLoaders, labeled and unlabeled, each with `workers` processes, as USB has them."""
    images, labels = data.train(), data.raw.labels("train")
    makers = (weak,), (weak, *[strong] * LAYOUT.strong_views)
    sets = [Samples(images, labels, ids, made) for ids, made in zip(data.ids(), makers, strict=True)]
    both = [
        DataLoader(
            samples,
            rows,
            sampler=RandomSampler(samples, num_samples=ENDLESS),
            num_workers=workers,
            worker_init_fn=reseed,
            multiprocessing_context="fork" if workers else None,
        )
        for samples, rows in zip(sets, (LAYOUT.labeled, LAYOUT.unlabeled), strict=True)
    ]
    yield from zip(*both, strict=True)


def pillow(workers: int) -> Callable[[Data], Generator[Any]]:
    """The recipe of `reference.pillow_views`, each image on its own."""

    def batches(data: Data) -> Generator[Any]:
        random, pad = Random(SEED), data.pad
        options = {"pad": pad, "cutout": OPTIONS.cutout, "mean": data.raw.mean, "std": data.raw.std}

        def weak(image: np.ndarray) -> Tensor:
            return pillow_views.render(Image.fromarray(image), pillow_views.draw_weak(random, pad), **options)

        def strong(image: np.ndarray) -> Tensor:
            view = pillow_views.draw_strong(random, data.side, pad, OPTIONS.cutout)
            return pillow_views.render(Image.fromarray(image), view, **options)

        return loaders(data, weak, strong, workers=workers, reseed=lambda _: random.seed(torch.initial_seed()))

    return batches


def torchvision_tensors(data: Data) -> Generator[Any]:
    """torchvision's own RandAugment (other operations) on uint8 tensors, each image on its own."""
    first = [v2.RandomHorizontalFlip(), v2.RandomCrop(data.side, padding=data.pad, padding_mode="reflect")]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(data.raw.mean), list(data.raw.std))]
    cutout = v2.RandomErasing(p=1, scale=(data.cutout_share,) * 2, ratio=(1, 1))
    weak = v2.Compose([*first, *last])
    strong = v2.Compose([*first, v2.RandAugment(OPTIONS.operations, LEVEL), *last, cutout])

    def on_tensor(transform: v2.Compose) -> Make:
        return lambda image: transform(torch.from_numpy(image).permute(2, 0, 1))

    return loaders(data, on_tensor(weak), on_tensor(strong), workers=0, reseed=torch.manual_seed)


def kornia_batches(data: Data) -> Generator[Any]:
    """kornia's own RandAugment (other operations, one choice for a whole batch), on batches of float tensors."""
    from kornia import augmentation  # pyright: ignore[reportMissingImports], optional
    from kornia.augmentation.auto import RandAugment  # pyright: ignore[reportMissingImports]

    crop = augmentation.RandomCrop((data.side, data.side), padding=data.pad, padding_mode="reflect")
    weak = torch.nn.Sequential(augmentation.RandomHorizontalFlip(), crop)
    operations = RandAugment(OPTIONS.operations, LEVEL)
    normalise = augmentation.Normalize(torch.tensor(data.raw.mean), torch.tensor(data.raw.std))
    cutout = augmentation.RandomErasing(p=1.0, scale=(data.cutout_share,) * 2, ratio=(1.0, 1.0))
    images, batches = data.train(), data.batches()
    for step in count():
        pixels = torch.from_numpy(images[batches.share(step).ids]).permute(0, 3, 1, 2).float() / 255
        labeled, unlabeled = pixels.split([LAYOUT.labeled, LAYOUT.unlabeled])
        strong = [cutout(normalise(operations(weak(unlabeled)))) for _ in range(LAYOUT.strong_views)]
        yield normalise(weak(labeled)), normalise(weak(unlabeled)), *strong


def ours(source_name: str, images: str = "raw") -> Callable[[Data], Generator[Tensor]]:
    """A source and the Augmenter, with what the engine does around them."""

    def batches(data: Data) -> Generator[Tensor]:
        manifest = data.png if images == "png" else data.raw
        draw = data.batches()
        augmenter = Augmenter(
            OPTIONS,
            seed=SEED,
            resolution=manifest.resolution,
            mean=manifest.mean,
            std=manifest.std,
            device=CPU,
            dtype=torch.float32,
        )
        labels = torch.from_numpy(manifest.labels("train").copy())
        pixels = torch.empty(LAYOUT.images, *manifest.resolution, 3, dtype=torch.uint8)
        with closing(open_source(source_name, manifest, CPU, lambda s: draw.share(s).ids, threads=1)) as source:
            for step in count():
                ids, visits = (torch.from_numpy(part) for part in draw.share(step))
                source.fetch(step, pixels)
                source.read(ids, pixels)
                yield augmenter.views(Rows(pixels, ids, visits, labels[ids[: LAYOUT.labeled]], LAYOUT))

    return batches


def decode(source_name: str, images: str = "raw") -> Callable[[Data], Generator[np.ndarray]]:
    """The rows alone."""

    def batches(data: Data) -> Generator[np.ndarray]:
        manifest, draw = data.png if images == "png" else data.raw, data.batches()
        with closing(host_rows(source_name, manifest, lambda step: draw.share(step).ids)) as rows:
            for step in count():
                yield rows.fetch(step)

    return batches


def host_rows(source_name: str, manifest: Manifest, order: Callable[[int], np.ndarray]) -> HostRows:
    if source_name == "ffcv":
        from semi_fast.pipelines.ffcv import FfcvRows

        return FfcvRows(manifest, order, threads=1)
    from semi_fast.pipelines.dali import DaliRows

    return DaliRows(manifest, order, threads=1)


BASELINE = "pillow-0"
PILLOW = "torch", "torchvision", "pillow"
OURS = ("torch", "numba") if find_spec("numba") else ("torch",)  # which compiles the views
RESIDENT_GOAL, HOST_GOAL = (Goal("cpu", "cpu_ratio", bound, True) for bound in (4, 3.5))
FFCV, DALI = ("torch", "ffcv", "numba"), ("torch", "nvidia-dali-cuda130")
PIPELINES = {
    BASELINE: Pipeline("DataLoader + Pillow, no workers", pillow(0), PILLOW),
    "pillow-1": Pipeline("DataLoaders + Pillow, 1 worker each", pillow(1), PILLOW),
    "pillow-2": Pipeline("DataLoaders + Pillow, 2 workers each", pillow(2), PILLOW),
    "torchvision": Pipeline("DataLoader + torchvision v2, no workers", torchvision_tensors, PILLOW[:2]),
    "kornia": Pipeline("kornia on batches", kornia_batches, ("torch", "kornia")),
    "resident": Pipeline("resident + Augmenter", ours("resident"), OURS, goal=RESIDENT_GOAL, ours=True),
    "ffcv": Pipeline("FFCV + Augmenter", ours("ffcv"), FFCV, goal=HOST_GOAL, ours=True),
    "dali-raw": Pipeline("DALI, raw + Augmenter", ours("dali"), (*OURS, DALI[1]), goal=HOST_GOAL, ours=True),
    "dali-png": Pipeline("DALI, PNG + Augmenter", ours("dali", "png"), (*OURS, DALI[1]), goal=HOST_GOAL, ours=True),
    "ffcv-decode": Pipeline("FFCV, decode alone", decode("ffcv"), FFCV, "images"),
    "dali-raw-decode": Pipeline("DALI, raw, decode alone", decode("dali"), DALI, "images"),
    "dali-png-decode": Pipeline("DALI, PNG, decode alone", decode("dali", "png"), DALI, "images"),
}
"""By the name that `--only` takes."""


def synthetic_images(rows: int, side: int, seed: int) -> np.ndarray:
    """uint8 [rows, side, side, 3]: soft patches of colour under noise, which compress about as photographs do."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(rows, 3, 6, 6, generator=generator) * 255
    soft = torch.nn.functional.interpolate(patches, size=(side, side), mode="bilinear")
    noisy = soft + 10 * torch.randn(soft.shape, generator=generator)
    return noisy.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def synthetic_data(root: Path, side: int, rows: int) -> Data:
    """Prepares a data set of `rows` training images in a folder of `root`."""
    labels = {part: np.arange(n) % CLASSES for part, n in (("train", rows), ("test", CLASSES))}

    def read() -> Raw:
        blocks = ((part, synthetic_images(len(ids), side, seed)) for seed, (part, ids) in enumerate(labels.items()))
        return Raw("synthetic", tuple(map(str, range(CLASSES))), (side, side), labels, 0, blocks, {"rule": "synthetic"})

    arguments = f"synthetic --side {side} --images {rows}"
    raw = publish(read, root / f"{side}-raw", arguments, Formats(("resident", "ffcv", "dali")))
    return Data(raw, as_png(raw, root / f"{side}-png"))


def real_data(root: Path, path: Path) -> Data:
    """The prepared data set at `path`, and a copy of it as PNG files in a folder of `root`."""
    raw = load_manifest(path)
    missing = {"resident", "ffcv", "dali"} - set(formats(raw))
    if missing:
        raise ValueError(f"--data must hold resident, ffcv and dali; {path} has no {', '.join(sorted(missing))}")
    return Data(raw, as_png(raw, root / "png"))


def as_png(manifest: Manifest, out: Path) -> Manifest:
    """The same data set with PNG files in DALI's shards."""

    def read() -> Raw:
        labels = {part: np.array(manifest.labels(part)) for part in PARTS[:2]}
        blocks = ((part, read_part(manifest, part, threads=1)) for part in PARTS if manifest.length(part))
        names, statistics = manifest.class_names, (manifest.mean, manifest.std)
        unlabeled = manifest.length("unlabeled")
        return Raw(manifest.dataset, names, manifest.resolution, labels, unlabeled, blocks, manifest.source, statistics)

    return publish(read, out, f"{manifest.dataset} as PNG files", Formats(("dali",), image_format="png"))
