"""Tiny raw data in the published layouts, and prepared directories, for tests; a colour for each class."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from semi_fast.data_prep.prepare import publish
from semi_fast.data_prep.readers import Raw
from semi_fast.prepared.manifest import Manifest

Sets = dict[str, tuple[np.ndarray, np.ndarray]]

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
IMAGENET127 = Path(__file__).resolve().parents[1] / "data_prep" / "imagenet127.json"
CIFAR100_NAMES = tuple(f"fine_{k:02d}" for k in range(100))


def images_of(labels: np.ndarray, side: int, seed: int) -> np.ndarray:
    """uint8 [n, side, side, 3]: noise around a colour that belongs to the class, so that a model can learn it."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(12345).integers(40, 216, (int(labels.max()) + 1, 3))
    noise = rng.integers(-40, 40, (len(labels), side, side, 3))
    return (colours[labels][:, None, None] + noise).astype(np.uint8)


def cifar_sets(num_classes: int, per_class: int, test_per_class: int, seed: int) -> Sets:
    """What the writers below write: {part: (uint8 [n, 32, 32, 3], int64 [n])}, classes mixed."""
    sets: Sets = {}
    for part, n, key in (("train", per_class, seed), ("test", test_per_class, seed + 1000)):
        labels = np.random.default_rng(key).permutation(np.repeat(np.arange(num_classes), n))
        sets[part] = images_of(labels, 32, key), labels
    return sets


def python2_pickle(value: Any) -> bytes:
    """`value` as Python 2 and numpy 1 pickled it: bytes as strings, names in numpy.core."""

    class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
        dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

        def save_bytes(self, content: bytes) -> None:
            short = len(content) < 256
            self.write(pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
            self.write(bytes([len(content)]) if short else struct.pack("<i", len(content)))
            self.write(content)
            self.memoize(content)

        dispatch[bytes] = save_bytes

    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def write_cifar10_python(
    root: Path,
    per_class: int = 20,
    seed: int = 0,
    *,
    test_per_class: int = 5,
    dumps: Callable[[Any], bytes] = python2_pickle,
) -> Path:
    """`root/cifar-10-batches-py`; returns `root`."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, images, labels in _cifar10_files(per_class, test_per_class, seed):
        files = [f"{name}_{i}.png".encode() for i in range(len(labels))]
        batch = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": rows_chw(images),
            b"filenames": files,
        }
        (folder / name).write_bytes(dumps(batch))
    meta = {
        b"label_names": [n.encode() for n in CIFAR10_NAMES],
        b"num_vis": 3072,
        b"num_cases_per_batch": per_class * 2,
    }
    (folder / "batches.meta").write_bytes(dumps(meta))
    return root


def write_cifar10_binary(root: Path, per_class: int = 20, seed: int = 0, *, test_per_class: int = 5) -> Path:
    """`root/cifar-10-batches-bin`; returns `root`."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, images, labels in _cifar10_files(per_class, test_per_class, seed):
        np.concatenate([labels.astype(np.uint8)[:, None], rows_chw(images)], axis=1).tofile(folder / f"{name}.bin")
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    return root


def write_cifar100_python(root: Path, per_class: int = 3, seed: int = 0, *, test_per_class: int = 1) -> Path:
    """`root/cifar-100-python`; returns `root`."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, (images, labels) in cifar_sets(100, per_class, test_per_class, seed).items():
        files = [f"{name}_{i}.png".encode() for i in range(len(labels))]
        batch = {b"filenames": files, b"batch_label": name.encode(), b"fine_labels": labels.tolist(),
                 b"coarse_labels": (labels // 5).tolist(), b"data": rows_chw(images)}  # fmt: skip
        (folder / name).write_bytes(python2_pickle(batch))
    names = {b"fine_label_names": [n.encode() for n in CIFAR100_NAMES], b"coarse_label_names": []}
    (folder / "meta").write_bytes(python2_pickle(names))
    return root


def write_cifar100_binary(root: Path, per_class: int = 3, seed: int = 0, *, test_per_class: int = 1) -> Path:
    """`root/cifar-100-binary`; returns `root`."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name, (images, labels) in cifar_sets(100, per_class, test_per_class, seed).items():
        leading = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
        np.concatenate([leading, rows_chw(images)], axis=1).tofile(folder / f"{name}.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(CIFAR100_NAMES) + "\n")
    return root


def write_image_folder(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog", "emu"),
    per_class: int = 6,
    seed: int = 0,
    *,
    test_per_class: int = 3,
    unlabeled: int = 0,
    side: int = 40,
    test: str = "test",
) -> Path:
    """PNG files under `root/train/<class>/`, `root/<test>/<class>/` and, if any, `root/unlabeled/`; returns `root`."""
    for part, n, key in (("train", per_class, seed), (test, test_per_class, seed + 1000)):
        labels = np.repeat(np.arange(len(classes)), n)
        for i, image in enumerate(images_of(labels, side, key)):
            folder = root / part / classes[labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:04d}.png")
    if unlabeled:
        (root / "unlabeled" / "deep").mkdir(parents=True)
        for i, image in enumerate(images_of(np.arange(unlabeled) % len(classes), side, seed + 2000)):
            Image.fromarray(image).save(root / "unlabeled" / ("deep" if i % 2 else ".") / f"{i:04d}.png")
    return root


def stl10_sets(counts: dict[str, int], seed: int = 0) -> Sets:
    """What `write_stl10` writes: {part: (uint8 [n, 96, 96, 3], int64 [n] in 0..9)}."""
    sets: Sets = {}
    for part, n in counts.items():
        labels = np.random.default_rng(seed).permutation(np.arange(n) % 10)
        sets[part] = images_of(labels, 96, seed + len(sets)), labels
    return sets


def write_stl10(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """`root/stl10_binary`; images as channels of columns, labels from 1; returns `root`."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, (images, labels) in stl10_sets(counts, seed).items():
        images.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            (labels + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(STL10_NAMES) + "\n")
    (folder / "fold_indices.txt").write_text("0 1 2\n")
    return root


def imagenet_batches(side: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(file, uint8 [n, side, side, 3], labels in 1..1000): each synset twice in the train batches, once in val_data."""
    rng = np.random.default_rng(seed)
    train = np.array_split(rng.permutation(np.arange(2000) % 1000), 10)
    for i, synsets in enumerate((*train, rng.permutation(1000))):
        name = f"train_data_batch_{i + 1}" if i < 10 else "val_data"
        yield name, images_of(synsets, side, seed + i), synsets + 1


def write_imagenet_batches(root: Path, side: int = 8, seed: int = 0, *, npz: bool = False, protocol: int = 3) -> Path:
    """Downsampled ImageNet: `root/Imagenet<side>_train*/train_data_batch_*`, `root/Imagenet<side>_val*/val_data`."""
    for name, images, labels in imagenet_batches(side, seed):
        folder = root / f"Imagenet{side}_{name.split('_')[0]}{'_npz' if npz else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        rows, mean = rows_chw(images), rows_chw(images).mean(axis=0)
        if npz:
            np.savez(folder / f"{name}.npz", data=rows, labels=labels, mean=mean)
        else:
            batch = {"data": rows, "labels": labels.tolist()} | ({} if name == "val_data" else {"mean": mean})
            (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return root


def write_ilsvrc(
    root: Path,
    folders: tuple[str, ...] = ("n01440764", "n02119789", "n02120079"),
    per_class: int = 3,
    seed: int = 0,
    *,
    val: str = "folders",
    size: tuple[int, int] = (48, 40),
) -> Path:
    """JPEG files under `root/train/<synset>/` and, one for each, `root/val/`: folders, ground_truth or solution."""
    synsets = [row[0] for row in json.loads(IMAGENET127.read_text())["synsets"]]
    named = []
    for part, n, key in (("train", per_class, seed), ("val", 1, seed + 1000)):
        for i, image in enumerate(images_of(np.repeat(np.arange(len(folders)), n), size[0], key)):
            wnid = folders[i // n]
            flat = part == "val" and val != "folders"
            name = f"ILSVRC2012_val_{i + 1:08d}" if part == "val" else f"{wnid}_{i}"
            folder = root / part / ("" if flat else wnid)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[: size[1]]).save(folder / f"{name}.JPEG", quality=95)
            named += [(name, wnid)] if flat else []
    if val == "ground_truth":
        lines = [f"{synsets.index(wnid) + 1}\n" for _, wnid in named]
        (root / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
    elif val == "solution":
        lines = [f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4 \n" for name, wnid in reversed(named)]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    return root


def write_prepared(
    out: Path,
    train: tuple[int, ...] = (30, 30, 30),
    test: tuple[int, ...] = (4, 4, 4),
    unlabeled: int = 0,
    *,
    side: int = 8,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Manifest:
    """A prepared directory at `out` with these class counts, classes mixed; the fast way to a `Manifest` for a test."""
    rng = np.random.default_rng(seed)
    labels = {p: rng.permutation(np.repeat(np.arange(len(n)), n)) for p, n in (("train", train), ("test", test))}

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        for i, (part, of_part) in enumerate(labels.items()):
            yield part, images_of(of_part, side, seed + i)
        if unlabeled:
            yield "unlabeled", images_of(rng.integers(0, len(train), unlabeled), side, seed + 2)

    names = tuple(class_names or (f"class_{k}" for k in range(len(train))))
    raw = Raw(
        "synthetic", names, (side, side), labels, unlabeled, blocks(), {"reader": "synthetic", "name": "synthetic"}
    )
    return publish(lambda: raw, out, "synthetic")


def rows_chw(images: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3] -> [n, 3*H*W], channel-major rows, as CIFAR stores them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def _cifar10_files(per_class: int, test_per_class: int, seed: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    sets = cifar_sets(10, per_class, test_per_class, seed)
    images, labels = sets["train"]
    for i, rows in enumerate(np.array_split(np.arange(len(labels)), 5)):
        yield f"data_batch_{i + 1}", images[rows], labels[rows]
    yield "test_batch", *sets["test"]
