"""Downsampled ImageNet (Chrabaszcz et al. 2017): ten train batches and one of validation, pickles or .npz files.

A batch has `data`, uint8 rows of 3*R*R in channel-major order, and `labels` in 1..1000 in the development kit's order.
Labels are read first; pixels stay in their files until they are copied block by block.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from semi_fast.data_prep.readers import Raw, check_count, name_of
from semi_fast.data_prep.readers.imagenet_classes import STATISTICS, load_table
from semi_fast.data_prep.readers.kept_chunks import identity
from semi_fast.data_prep.restricted_unpickler import StoredArray, load_stored_dict
from semi_fast.prepared.manifest import file_sha256

TRAIN = tuple(f"train_data_batch_{i}" for i in range(1, 11))
VAL = "val_data"
VAL_IMAGES = 50_000
SIDES = (8, 16, 32, 64)
BLOCK_IMAGES = 1024
LABELS_LIMIT_BYTES = 2**26
RATIO_LIMIT = 200  # of what an archive's entry unpacks to, over what it takes
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError)


@dataclass(frozen=True)
class Batch:
    """A file, the labels in it and where its pixels begin."""

    path: Path
    labels: np.ndarray
    """int64 [n] in 0..999."""
    side: int
    offset: int
    """Bytes before the first pixel: in the file, or in the member `data.npy` of an .npz file."""


def find_batches(raw: Path) -> dict[str, list[Path]]:
    """The batch files in `raw` or in folders of it by name; empty where there is none."""
    found = {}
    for name in (*TRAIN, VAL):
        patterns = (name, f"{name}.npz", f"*/{name}", f"*/{name}.npz")
        paths = sorted(path for pattern in patterns for path in raw.glob(pattern) if path.is_file())
        if paths:
            found[name] = paths
    return found


def read_batches(found: dict[str, list[Path]], raw: Path, resolution: int | None) -> Raw:
    """Rows in the order of the batches; ValueError names a missing, repeated or damaged file."""
    missing = [name for name in (*TRAIN, VAL) if name not in found]
    if missing:
        raise ValueError(f"{raw}: downsampled ImageNet is ten train batches and val_data; {', '.join(missing)} missing")
    for name, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"{raw}: must hold one {name}; it has {', '.join(str(p.relative_to(raw)) for p in paths)}")
    batches = {name: _open_batch(found[name][0]) for name in (*TRAIN, VAL)}
    side = batches[VAL].side
    for batch in batches.values():
        if batch.side != side:
            raise ValueError(f"{batch.path}: has {batch.side}x{batch.side} images where val_data has {side}x{side}")
    if resolution not in (None, side):
        raise ValueError(f"--resolution must be that of the batches, {side}, or left out; got {resolution}")
    synsets = {"train": np.concatenate([batches[name].labels for name in TRAIN]), "test": batches[VAL].labels}
    _check_published(batches[VAL].path, synsets, raw)
    table = load_table()
    labels = {part: table.class_of[of_part] for part, of_part in synsets.items()}
    digests: dict[str, str] = {}
    source: dict[str, Any] = {"reader": "downsampled imagenet", "name": name_of(raw.resolve()), "sha256": digests}
    return Raw(
        dataset="imagenet127",
        class_names=table.class_names,
        resolution=(side, side),
        labels=labels,
        num_unlabeled=0,
        blocks=_blocks(batches, digests),
        blocks_after=lambda rows: _blocks(batches, digests, rows),
        identity=identity(raw, [str(batch.path.relative_to(raw)) for batch in batches.values()], side),
        source=source,
        statistics=STATISTICS,
    )


def _check_published(val: Path, synsets: dict[str, np.ndarray], raw: Path) -> None:
    """The images of ILSVRC-2012, as many of each synset, or the labels count in another order."""
    table = load_table()
    check_count(raw / f"{TRAIN[0]} to {len(TRAIN)}", len(synsets["train"]), table.train_images)
    check_count(val, len(synsets["test"]), VAL_IMAGES)
    differing = np.flatnonzero(np.bincount(synsets["train"], minlength=len(table.synsets)) != table.train_counts)
    if len(differing):
        raise ValueError(
            f"{raw}: labels must follow the development kit (1 is {table.synsets[0]}); {len(differing)} of them "
            "have another number of images there: get the published batches"
        )


def _blocks(batches: dict[str, Batch], digests: dict[str, str], skipped: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """`skipped` first rows are only passed over."""
    with ThreadPoolExecutor(1) as pool:
        for name, batch in batches.items():
            start = min(skipped, len(batch.labels))
            skipped -= start
            sha256 = pool.submit(file_sha256, batch.path)
            with _pixels(batch) as file:
                file.seek(start * 3 * batch.side**2, io.SEEK_CUR)
                for first in range(start, len(batch.labels), BLOCK_IMAGES):
                    rows = min(BLOCK_IMAGES, len(batch.labels) - first)
                    wanted = rows * 3 * batch.side**2
                    content = file.read(wanted)
                    if len(content) != wanted:
                        raise ValueError(f"{batch.path}: became shorter while it was read; prepare again")
                    images = np.frombuffer(content, np.uint8).reshape(rows, 3, batch.side, batch.side)
                    yield "test" if name == VAL else "train", np.ascontiguousarray(images.transpose(0, 2, 3, 1))
            digests[batch.path.name] = sha256.result()


@contextmanager
def _pixels(batch: Batch) -> Iterator[IO[bytes]]:
    """The file that holds the pixels, standing at the first."""
    if batch.path.suffix != ".npz":
        with batch.path.open("rb") as file:
            file.seek(batch.offset)
            yield file
        return
    try:
        with zipfile.ZipFile(batch.path) as archive, archive.open("data.npy") as member:
            member.read(batch.offset)
            yield member
    except ZIP_ERRORS as error:  # of the checksum, too
        raise _damaged(batch.path, error) from error


def _open_batch(path: Path) -> Batch:
    shape, offset, labels = _npz_entries(path) if path.suffix == ".npz" else _pickle_entries(path)
    sides = {3 * side * side: side for side in SIDES}
    if len(shape) != 2 or shape[1] not in sides:
        known = ", ".join(map(str, SIDES))
        raise ValueError(f"{path}: data must be [n, 3*R*R] with R one of {known}; got {list(shape)}; get it again")
    if not isinstance(labels, list) or len(labels) != shape[0] or not labels:
        got = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: must list one label for each of {shape[0]} images; got {got}; get the file again")
    synsets = len(load_table().synsets)
    bad = [i for i, label in enumerate(labels) if type(label) is not int or not 1 <= label <= synsets]
    if bad:
        shown = ", ".join(f"row {i}: {labels[i]!r:.40}" for i in bad[:5])
        raise ValueError(f"{path}: labels must be integers in 1..{synsets}; {len(bad)} are not ({shown})")
    return Batch(path, np.array(labels, np.int64) - 1, sides[shape[1]], offset)


def _pickle_entries(path: Path) -> tuple[tuple[int, ...], int, Any]:
    """(shape of data, where it begins, labels)."""
    batch = load_stored_dict(path)
    for key in ("data", "labels"):
        if key not in batch:
            raise ValueError(f"{path}: has no entry {key!r}: not a batch of this data set; get the file again")
    data = batch["data"]
    if not isinstance(data, StoredArray):
        raise ValueError(f"{path}: data must be a uint8 array; got {type(data).__name__}; get the file again")
    return data.shape, data.offset, batch["labels"]


def _npz_entries(path: Path) -> tuple[tuple[int, ...], int, Any]:
    """As `_pickle_entries`, of an .npz file; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open("data.npy") as member:
                shape, dtype, offset = _npy_header(member)
            size = archive.getinfo("data.npy").file_size
            if dtype != np.uint8 or math.prod(shape) + offset != size:
                raise ValueError(f"data must be uint8 row by row; got {dtype} {list(shape)} in {size} bytes")
            for found in (archive.getinfo(name) for name in ("data.npy", "labels.npy")):
                if found.file_size > RATIO_LIMIT * max(1, found.compress_size):
                    raise ValueError(f"{found.filename} unpacks to more than {RATIO_LIMIT} times its size")
            if archive.getinfo("labels.npy").file_size > LABELS_LIMIT_BYTES:
                raise ValueError(f"labels must have at most {LABELS_LIMIT_BYTES} bytes")
            with archive.open("labels.npy") as member:
                labels = np.lib.format.read_array(member, allow_pickle=False)
        return shape, offset, labels.ravel().tolist()
    except (*ZIP_ERRORS, ValueError) as error:
        raise _damaged(path, error) from error


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, length of the header) of an array stored row by row."""
    version = np.lib.format.read_magic(member)
    if version != (1, 0):
        raise ValueError(f"its array has a header of version {version}")
    shape, column_major, dtype = np.lib.format.read_array_header_1_0(member)
    if column_major:
        raise ValueError("data must lie row by row")
    return shape, dtype, member.tell()


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged, truncated or not a batch ({error or type(error).__name__}); get it again")
