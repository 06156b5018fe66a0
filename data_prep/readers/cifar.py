"""CIFAR-10 and CIFAR-100 in their two published layouts: python batches, and the binary version without pickle."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semi_fast.data_prep.readers import Raw, check_count, name_of
from semi_fast.data_prep.restricted_unpickler import load_dict

SIDE = 32
PIXEL_BYTES = 3 * SIDE * SIDE
FILE_LIMIT_BYTES = 2**30
IMAGES = {"train": 50_000, "test": 10_000}
"""Of both data sets, spread evenly over the files of a part."""


@dataclass(frozen=True)
class Layout:
    """Where a published layout keeps its files: train files in row order, the test file, the class names."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str


@dataclass(frozen=True)
class Cifar:
    """What differs between the two data sets; statistics as in the papers (of pixels / 255)."""

    num_classes: int
    binary: Layout
    python: Layout
    label_bytes: int
    """Leading bytes of a binary record; the label is the last of them."""
    labels_key: str
    names_key: str
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]]


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = {
    "cifar10": Cifar(
        num_classes=10,
        binary=Layout("cifar-10-batches-bin", tuple(f"{b}.bin" for b in BATCHES), "test_batch.bin", "batches.meta.txt"),
        python=Layout("cifar-10-batches-py", BATCHES, "test_batch", "batches.meta"),
        label_bytes=1,
        labels_key="labels",
        names_key="label_names",
        statistics=((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    ),
    "cifar100": Cifar(
        num_classes=100,
        binary=Layout("cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt"),
        python=Layout("cifar-100-python", ("train",), "test", "meta"),
        label_bytes=2,
        labels_key="fine_labels",
        names_key="fine_label_names",
        statistics=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
}


def read_cifar(dataset: str, raw: Path) -> Raw:
    """`dataset` (cifar10 or cifar100) from `raw`, which holds or is the published folder; rows in published order.

    Where both layouts are there, the binary one is read. ValueError names a missing or damaged file.
    """
    spec = CIFAR[dataset]
    folder, layout, binary = _find(dataset, spec, raw)
    digests: dict[str, str] = {}

    def content(name: str) -> tuple[Path, bytes]:
        path = folder / name
        if not path.is_file():
            needed = ", ".join((*layout.train, layout.test, layout.names))
            raise ValueError(f"{path}: missing; {dataset} needs {needed}")
        if path.stat().st_size > FILE_LIMIT_BYTES:
            raise ValueError(f"{path}: must be at most {FILE_LIMIT_BYTES} bytes; it has {path.stat().st_size}")
        data = path.read_bytes()
        digests[name] = hashlib.sha256(data).hexdigest()
        return path, data

    read_names, read_batch = (_binary_names, _binary_batch) if binary else (_python_names, _python_batch)
    names = read_names(*content(layout.names), spec)
    batches, parts = [], ["train"] * len(layout.train) + ["test"]
    for part, name in zip(parts, (*layout.train, layout.test), strict=True):
        batches.append(read_batch(*content(name), spec))
        check_count(folder / name, len(batches[-1][1]), IMAGES[part] // parts.count(part))
    *train, test = (labels for _, labels in batches)
    return Raw(
        dataset=dataset,
        class_names=names,
        resolution=(SIDE, SIDE),
        labels={"train": np.concatenate(train), "test": test},
        num_unlabeled=0,
        blocks=iter([(part, _nhwc(rows)) for part, (rows, _) in zip(parts, batches, strict=True)]),
        source={"reader": "cifar binary" if binary else "cifar python", "name": name_of(folder), "sha256": digests},
        statistics=spec.statistics,
    )


def _find(dataset: str, spec: Cifar, raw: Path) -> tuple[Path, Layout, bool]:
    for layout, binary in ((spec.binary, True), (spec.python, False)):
        for folder in (raw / layout.folder, raw):
            if any((folder / name).exists() for name in (*layout.train, layout.test)):
                return folder, layout, binary
    raise ValueError(
        f"--raw must hold {spec.binary.folder}/ or {spec.python.folder}/ with the files of {dataset}; {raw} does not"
    )


def _nhwc(rows: np.ndarray) -> np.ndarray:
    """uint8 [n, 3072] of channel-major rows -> [n, 32, 32, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _python_batch(path: Path, content: bytes, spec: Cifar) -> tuple[np.ndarray, np.ndarray]:
    batch = load_dict(path, content)
    rows, labels = _entry(path, batch, "data"), _entry(path, batch, spec.labels_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != PIXEL_BYTES:
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise ValueError(f"{path}: data must be uint8 [n, {PIXEL_BYTES}]; got {found}; get the file again")
    if not isinstance(labels, list) or len(labels) != len(rows):
        found = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: must list one label for each of {len(rows)} images; got {found}; get the file again")
    return rows, _checked_labels(path, labels, spec.num_classes)


def _binary_batch(path: Path, content: bytes, spec: Cifar) -> tuple[np.ndarray, np.ndarray]:
    size = spec.label_bytes + PIXEL_BYTES
    if len(content) % size:
        raise ValueError(f"{path}: must be a multiple of {size} bytes; got {len(content)}: truncated, get it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, spec.label_bytes - 1].tolist()
    return records[:, spec.label_bytes :], _checked_labels(path, labels, spec.num_classes)


def _checked_labels(path: Path, labels: list[Any], num_classes: int) -> np.ndarray:
    bad = [i for i, label in enumerate(labels) if type(label) is not int or not 0 <= label < num_classes]
    if bad:
        shown = ", ".join(f"row {i}: {labels[i]!r:.40}" for i in bad[:5])
        raise ValueError(f"{path}: labels must be integers in 0..{num_classes - 1}; {len(bad)} are not ({shown})")
    return np.array(labels, np.int64)


def _python_names(path: Path, content: bytes, spec: Cifar) -> tuple[str, ...]:
    names = _entry(path, load_dict(path, content), spec.names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{path}: {spec.names_key} must be a list of text; get the file again")
    return _checked_names(path, [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names], spec)


def _binary_names(path: Path, content: bytes, spec: Cifar) -> tuple[str, ...]:
    return _checked_names(path, [n.strip() for n in content.decode("utf-8", "replace").splitlines() if n.strip()], spec)


def _checked_names(path: Path, names: list[str], spec: Cifar) -> tuple[str, ...]:
    found = len(set(names))
    if found != spec.num_classes or len(names) != spec.num_classes:
        raise ValueError(f"{path}: must name {spec.num_classes} different classes; got {found} in {len(names)} lines")
    return tuple(names)


def _entry(path: Path, batch: dict[str, Any], key: str) -> Any:
    if key not in batch:
        raise ValueError(f"{path}: has no entry {key!r}: not a batch of this data set, or damaged; get the file again")
    return batch[key]
