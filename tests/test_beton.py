"""The .beton files: what is written is read, and damage of every kind is a ValueError before anything is mapped."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers.ffcv import FfcvWriter, needed_bytes
from semi_fast.pipelines.ffcv import FfcvRows, open_part, read_part
from semi_fast.prepared import beton
from semi_fast.prepared.beton import (
    ENTRY,
    FIELD,
    HEADER,
    RECORD,
    RECORDS_AT,
    BetonFile,
    beton_file,
    layout_of,
    open_beton,
)
from semi_fast.prepared.manifest import Manifest, file_sha256

SIZES = [(1, 1, 9), (5, 7, 4), (96, 96, 600), (224, 224, 60), (1024, 1024, 5), (1700, 1700, 2)]  # up to three pages


def pixels(rows: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)


def write(path: Path, images: np.ndarray, cuts: tuple[int, ...] = (), first: int = 0) -> dict[str, Any]:
    """Labels count down from 2, ids up from `first`."""
    ids = np.arange(first, first + len(images))
    file = BetonFile(path, 2 - np.arange(len(images)), ids, (images.shape[1], images.shape[2]))
    for block in np.split(images, cuts):
        file.write(block)
    entry = file.finish()
    file.close()
    return entry


@pytest.mark.parametrize(("height", "width", "rows"), SIZES)
def test_what_is_written_is_read(tmp_path: Path, height: int, width: int, rows: int) -> None:
    images = pixels(rows, height, width)
    entry = write(tmp_path / "a.beton", images, first=70)
    assert entry == {"bytes": (tmp_path / "a.beton").stat().st_size, "sha256": file_sha256(tmp_path / "a.beton")}
    assert entry["bytes"] == layout_of(rows, (height, width)).file_bytes
    file = open_beton(tmp_path / "a.beton")
    assert file.resolution == (height, width)
    assert np.array_equal(file.images(), images)
    assert np.array_equal(file.labels, 2 - np.arange(rows))
    assert np.array_equal(file.ids, 70 + np.arange(rows))
    some = np.random.default_rng(1).integers(0, rows, 11)
    assert np.array_equal(file.images(some), images[some])
    assert file.images().flags.writeable, "a copy, not the map"


@settings(max_examples=30)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    rows=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
)
def test_blocks_of_any_sizes_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, rows: int, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("beton")
    images = pixels(rows, height, width, seed=height)
    assert write(folder / "a", images) == write(folder / "b", images, tuple(cuts))
    assert np.array_equal(open_beton(folder / "b").images(), images)
    for path in folder.iterdir():
        path.unlink()


def test_the_bytes_are_those_of_before(tmp_path: Path) -> None:
    """The format is FFCV's, which reads files of years ago; a change here makes others of the same data."""
    images = np.arange(7 * 5 * 4 * 3, dtype=np.uint8).reshape(7, 5, 4, 3)
    digest = "a9db3526a6e328a1cd33e5473c441c0c7fd64de6fd4e973a14b691ee335bc001"
    assert write(tmp_path / "a.beton", images) == {"bytes": 8_389_196, "sha256": digest}


def test_a_file_larger_than_memory_could_be_written(tmp_path: Path) -> None:
    block, blocks = pixels(100, 64, 64), 40
    file = BetonFile(tmp_path / "a.beton", np.zeros(4000, np.int64), np.arange(4000), (64, 64))
    tracemalloc.start()
    for _ in range(blocks):
        file.write(block)
    file.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file.close()
    assert blocks * block.nbytes > 45 * 2**20
    assert peak < 12 * 2**20, "one page of zeros and two blocks"


def test_what_stood_there_does_not_matter(tmp_path: Path, whole: bytes) -> None:
    write(tmp_path / "a.beton", pixels(3, 2, 2))
    (tmp_path / "b.beton").write_bytes(whole)
    assert write(tmp_path / "b.beton", pixels(3, 2, 2)) == write(tmp_path / "a.beton", pixels(3, 2, 2))
    assert (tmp_path / "b.beton").read_bytes() == (tmp_path / "a.beton").read_bytes()


def test_rows_are_counted(tmp_path: Path) -> None:
    file = BetonFile(tmp_path / "b.beton", np.zeros(3, np.int64), np.arange(3), (2, 2))
    file.write(pixels(2, 2, 2))
    with pytest.raises(AssertionError):
        file.finish()
    with pytest.raises(AssertionError):
        file.write(pixels(2, 2, 2))
    file.close()
    with pytest.raises(ValueError, match="the file has"):  # what a killed writer leaves
        open_beton(tmp_path / "b.beton")


@pytest.mark.parametrize("resolution", [(0, 4), (4, 70_000), (30_000, 30_000)])
def test_images_that_the_format_cannot_hold_are_refused(resolution: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"must have 1\.\.65535 pixels a side"):
        layout_of(1, resolution)


ROWS, SIDE = 3, 4
WHERE = layout_of(ROWS, (SIDE, SIDE))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.beton"
    write(path, pixels(ROWS, SIDE, SIDE))
    return path.read_bytes()


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped here."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("mapped")

    monkeypatch.setattr(np, "memmap", refuse)


@pytest.mark.usefixtures("unmapped")
def test_opening_maps_nothing(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "a.beton").write_bytes(whole)
    open_beton(tmp_path / "a.beton")


BOUNDARIES = (
    0, HEADER.itemsize, RECORDS_AT, *(RECORDS_AT + RECORD.itemsize * k for k in (1, ROWS)), WHERE.images_at,
    *(WHERE.images_at + WHERE.image_bytes * k for k in (1, 2)), WHERE.table_at,
    *(WHERE.table_at + ENTRY.itemsize * k for k in (1, 2)), WHERE.file_bytes,
)  # fmt: skip


@pytest.mark.usefixtures("unmapped")
@pytest.mark.parametrize("length", sorted({b + d for b in BOUNDARIES for d in (-1, 0, 1)} - {-1, WHERE.file_bytes}))
def test_a_file_of_another_length_is_refused(tmp_path: Path, whole: bytes, length: int) -> None:
    path = tmp_path / "cut.beton"
    path.write_bytes(whole[:length].ljust(length, b"\0"))
    with pytest.raises(ValueError, match=r"cut\.beton: .*(need|make) \d+ bytes.* the file has \d+; the file is damag"):
        open_beton(path)


def refused(path: Path) -> bool:
    try:
        open_beton(path)
    except ValueError as error:
        return str(path) in str(error)
    return False


@pytest.mark.usefixtures("unmapped")
def test_every_flipped_bit_of_structure_is_refused(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "a.beton"
    path.write_bytes(whole)
    dtype_at = [(HEADER, 0), (FIELD, HEADER.itemsize), (RECORD, RECORDS_AT), (ENTRY, WHERE.table_at)]
    counts = dict(zip(dtype_at, (1, 3, ROWS, ROWS), strict=True))
    content = {(RECORD, "label"), (RECORD, "index")}  # any value is one
    places = []
    for (dtype, at), count in counts.items():
        assert dtype.fields is not None
        for name, (of_field, offset, *_) in dtype.fields.items():
            if (dtype, name) not in content:
                start = [at + k * dtype.itemsize + offset for k in range(count)]
                places += [s + byte for s in start for byte in range(of_field.itemsize)]
    assert len(places) == HEADER.itemsize + 3 * FIELD.itemsize + ROWS * (16 + ENTRY.itemsize)
    accepted = []
    with path.open("r+b", buffering=0) as file:
        for place in places:
            in_fields = HEADER.itemsize <= place < RECORDS_AT
            for bit in [place % 8] if in_fields else range(8):
                file.seek(place)
                file.write(bytes([whole[place] ^ 1 << bit]))
                accepted += [] if refused(path) else [(place, bit)]
            file.seek(place)
            file.write(whole[place : place + 1])
    assert accepted == []
    open_beton(path)


def patched(whole: bytes, dtype: np.dtype, at: int, number: int, /, **values: object) -> bytes:
    entry = np.frombuffer(whole, dtype, 1, at + number * dtype.itemsize).copy()
    for name, value in values.items():
        entry[name] = value
    start = at + number * dtype.itemsize
    return whole[:start] + entry.tobytes() + whole[start + dtype.itemsize :]


def moved(whole: bytes, row: int, pointer: int) -> bytes:
    """Record and table of one row agree on another place."""
    whole = patched(whole, RECORD, RECORDS_AT, row, pointer=pointer)
    return patched(whole, ENTRY, WHERE.table_at, row, pointer=pointer)


AT, SIZE, TABLE = WHERE.images_at, WHERE.image_bytes, WHERE.table_at
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "zero header": (lambda w: bytes(24) + w[24:], "version must be 2; got 0"),
    "version": (lambda w: patched(w, HEADER, 0, 0, version=1), "version must be 2; got 1"),
    "no rows": (lambda w: patched(w, HEADER, 0, 0, rows=0), "there must be a row"),
    "fewer rows": (lambda w: patched(w, HEADER, 0, 0, rows=2), "2 rows and a table at"),
    "many rows": (lambda w: patched(w, HEADER, 0, 0, rows=2**63), "behind the allocation table"),
    "two fields": (lambda w: patched(w, HEADER, 0, 0, fields=2), "there must be 3 fields; got 2"),
    "page size": (lambda w: patched(w, HEADER, 0, 0, page_bytes=0), "power of two"),
    "odd page size": (lambda w: patched(w, HEADER, 0, 0, page_bytes=2**23 + 2**22), "power of two"),
    "arrays": (lambda w: patched(w, FIELD, 24, 0, kind=4), "fields must be image, label, index"),
    "name": (lambda w: patched(w, FIELD, 24, 1, name=b"target"), "fields must be image, label, index; got .*target"),
    "jpeg": (lambda w: patched(w, RECORD, RECORDS_AT, 1, mode=0), "must be raw"),
    "another size": (lambda w: patched(w, RECORD, RECORDS_AT, 1, width=SIDE + 1), "must be 4 x 4, as the first is"),
    "no pixels": (lambda w: patched(w, RECORD, RECORDS_AT, 0, width=0), "must have pixels"),
    "huge": (lambda w: patched(w, RECORD, RECORDS_AT, 0, width=60_000, height=60_000), "as the first is"),
    "beyond the file": (lambda w: moved(w, 1, 2**40), "between the records and the table"),
    "beyond int64": (lambda w: moved(w, 1, 2**64 - 48), "between the records and the table"),
    "in the header": (lambda w: moved(w, 0, 0), "between the records and the table"),
    "in the table": (lambda w: moved(w, 2, TABLE - SIZE + 1), "between the records and the table"),
    "overlapping": (lambda w: moved(w, 1, AT + 1), "must not overlap"),
    "twice": (lambda w: moved(w, 1, AT), "must not overlap"),
    "across pages": (lambda w: moved(w, 0, AT - 1), "end of a page"),
    "record alone": (lambda w: patched(w, RECORD, RECORDS_AT, 0, pointer=AT - SIZE), "point to the same images"),
    "table row": (lambda w: patched(w, ENTRY, TABLE, 0, row=1), "name every row once"),
    "table row far": (lambda w: patched(w, ENTRY, TABLE, 0, row=2**63), "name every row once"),
    "table size": (lambda w: patched(w, ENTRY, TABLE, 0, bytes=SIZE + 1), "must have 48 bytes in the table"),
    "empty": (lambda w: b"", "the file has 0"),
    "text": (lambda w: b"Not a .beton file at all.\n" * 200, "version must be 2"),
    "random": (lambda w: np.random.default_rng(0).bytes(len(w)), "version must be 2"),
}  # fmt: skip


@pytest.mark.usefixtures("unmapped")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, whole: bytes, name: str) -> None:
    damage, rule = DAMAGE[name]
    path = tmp_path / "bad.beton"
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=rf"bad\.beton: .*{rule}.*; .* prepare again"):
        open_beton(path)


def test_a_file_that_is_missing_or_shrinks_is_named(tmp_path: Path, whole: bytes, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="no such"):
        open_beton(tmp_path / "a.beton")
    with pytest.raises(ValueError, match="no such"):
        open_beton(tmp_path)
    path = tmp_path / "short.beton"
    path.write_bytes(whole[:-1])
    monkeypatch.setattr(beton.os, "fstat", lambda _: (tmp_path / "whole").stat())
    (tmp_path / "whole").write_bytes(whole)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        open_beton(path)


def raw_of(images: dict[str, np.ndarray], block_rows: int = 7) -> Raw:
    """The parts' rows in blocks; labels 0, 1, 0, 1, ..."""
    labels = {part: np.arange(len(images[part])) % 2 for part in ("train", "test")}
    blocks = ((part, of[i : i + block_rows]) for part, of in images.items() for i in range(0, len(of), block_rows))
    return Raw("synthetic", ("a", "b"), images["train"].shape[1:3], labels, len(images["unlabeled"]), blocks, {})  # type: ignore[arg-type]


def written(root: Path, images: dict[str, np.ndarray]) -> Manifest:
    """A manifest over `root/ffcv/` and the labels, as far as the reader looks at it."""
    raw = raw_of(images)
    root.mkdir()
    writer = FfcvWriter(raw, root)
    for part, block in raw.blocks:
        writer.write(part, block)
    entries = writer.finish()
    writer.close()
    assert sum(entry["bytes"] for entry in entries.values()) == needed_bytes(raw)

    class Labels(Manifest):
        def labels(self, part: str) -> np.ndarray:
            return raw.labels[part]

    counts = {part: tuple(np.bincount(labels, minlength=2).tolist()) for part, labels in raw.labels.items()}
    return Labels(
        root, raw.dataset, raw.class_names, raw.resolution, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5),
        counts | {"unlabeled": raw.num_unlabeled}, {}, {}, "", {}, resident=False, containers=entries,
    )  # fmt: skip


def test_the_writer_fills_one_file_for_each_part(tmp_path: Path) -> None:
    images = {"train": pixels(20, 6, 5), "test": pixels(9, 6, 5, 1), "unlabeled": pixels(31, 6, 5, 2)}
    manifest = written(tmp_path / "data", images)
    assert {name: (e["format"], e["part"], e["rows"]) for name, e in manifest.containers.items()} == {
        "ffcv/train.beton": ("ffcv", "train", 20),
        "ffcv/test.beton": ("ffcv", "test", 9),
        "ffcv/unlabeled.beton": ("ffcv", "unlabeled", 31),
    }
    for part, of_part in images.items():
        file = open_part(manifest, part)
        first = 20 if part == "unlabeled" else 0
        assert np.array_equal(file.ids, first + np.arange(len(of_part)))
        assert np.array_equal(file.labels, np.full(31, -1) if first else np.arange(len(of_part)) % 2)
        assert np.array_equal(read_part(manifest, part), of_part)
        assert np.array_equal(read_part(manifest, part, np.array([3, 0, 3])), of_part[[3, 0, 3]])
    again = written(tmp_path / "again", images)
    assert again.containers == manifest.containers


def test_a_part_without_rows_has_no_file(tmp_path: Path) -> None:
    images = {"train": pixels(4, 6, 5), "test": pixels(2, 6, 5), "unlabeled": pixels(0, 6, 5)}
    manifest = written(tmp_path / "data", images)
    assert sorted(manifest.containers) == ["ffcv/test.beton", "ffcv/train.beton"]
    assert read_part(manifest, "unlabeled").shape == (0, 6, 5, 3)


@pytest.mark.usefixtures("unmapped")
def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    images = {part: pixels(8, 6, 5, seed) for seed, part in enumerate(("train", "test", "unlabeled"))}
    manifest = written(tmp_path / "data", images)
    train, test, unlabeled = (manifest.root / beton_file(part) for part in images)
    good = train.read_bytes()

    train.write_bytes(test.read_bytes())
    with pytest.raises(ValueError, match=r"train\.beton: content differs from its SHA-256"):
        open_part(manifest, "train")
    train.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"train\.beton: must have \d+ bytes"):
        open_part(manifest, "train")
    train.write_bytes(good[: 2**23] + bytes([good[2**23] ^ 1]) + good[2**23 + 1 :])  # one bit of one pixel
    with pytest.raises(ValueError, match=r"train\.beton: content differs from its SHA-256"):
        open_part(manifest, "train")
    train.unlink()
    with pytest.raises(ValueError, match=r"train\.beton: named by the manifest, but missing"):
        open_part(manifest, "train")

    entries = {name: manifest.containers[beton_file("unlabeled")] for name in manifest.containers}
    train.write_bytes(unlabeled.read_bytes())
    with pytest.raises(ValueError, match=r"train\.beton: resolution, sample ids or labels differ"):
        open_part(replace(manifest, containers=entries), "train")
    with pytest.raises(ValueError, match=r"has no ffcv/test\.beton: prepare it with the format ffcv"):
        open_part(replace(manifest, containers={}), "test")


def test_a_missing_ffcv_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = {part: pixels(4, 6, 5) for part in ("train", "test", "unlabeled")}
    manifest = written(tmp_path / "data", images)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    with pytest.raises(RuntimeError) as error:
        FfcvRows(manifest, lambda step: np.arange(4), threads=1)
    text = str(error.value)
    assert "\n" not in text
    assert "apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++" in text
    assert "pip install 'semi-fast[ffcv]'" in text
    assert np.array_equal(read_part(manifest, "train"), images["train"]), "reading whole parts needs no FFCV"
