"""FFCV's .beton files (format version 2) of raw RGB images of one size: written front to back, read with every pointer
checked; numpy alone.

    header | three field descriptors | one record per row | zeros up to a page | images | allocation table

The fields are `image` (raw RGB), `label` and `index` (the sample id). No image crosses the end of a page.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from semi_fast.prepared.hashed_file import HashedFile

VERSION = 2
RAW_MODE = 1
PAGE_BYTES = 2**23
PAGE_BYTES_RANGE = (2**21, 2**31)
SIDE_LIMIT = 2**16 - 1

HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("rows", "<u8"), ("table_at", "<u8")])
FIELD = np.dtype([("kind", "<u1"), ("name", "S16"), ("arguments", "V1024")])
FIELDS = np.array([(2, b"image", b""), (1, b"label", b""), (1, b"index", b"")], FIELD)
RECORD = np.dtype(
    [
        ("mode", "<u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("pointer", "<u8"),
        ("padding", "<u1", 3),
        ("label", "<i8"),
        ("index", "<i8"),
    ]
)
ENTRY = np.dtype([("row", "<u8"), ("pointer", "<u8"), ("bytes", "<u8")])
RECORDS_AT = HEADER.itemsize + FIELDS.nbytes


class Layout(NamedTuple):
    """Where things stand in a file that this module writes."""

    image_bytes: int
    page_bytes: int
    images_at: int
    table_at: int
    file_bytes: int

    def pointers(self, rows: int) -> np.ndarray:
        """int64 [rows]: where each image begins."""
        page, within = np.divmod(np.arange(rows, dtype=np.int64), self.page_bytes // self.image_bytes)
        return self.images_at + page * self.page_bytes + within * self.image_bytes


def beton_file(part: str) -> str:
    """The file of `train`, `test` or `unlabeled`, relative to the prepared directory."""
    return f"ffcv/{part}.beton"


def layout_of(rows: int, resolution: tuple[int, int]) -> Layout:
    """That of `rows` images of (height, width); ValueError for images that the format cannot hold."""
    image_bytes = math.prod(resolution) * 3
    if min(resolution) < 1 or max(resolution) > SIDE_LIMIT or image_bytes > PAGE_BYTES_RANGE[1]:
        raise ValueError(f".beton images must have 1..{SIDE_LIMIT} pixels a side, 2 GiB at most; got {resolution}")
    page_bytes = max(PAGE_BYTES, 1 << (image_bytes - 1).bit_length())
    assert rows > 0, rows
    images_at = -(-(RECORDS_AT + rows * RECORD.itemsize) // page_bytes) * page_bytes
    page, within = divmod(rows - 1, page_bytes // image_bytes)
    table_at = images_at + page * page_bytes + (within + 1) * image_bytes
    return Layout(image_bytes, page_bytes, images_at, table_at, table_at + rows * ENTRY.itemsize)


class BetonFile:
    """A new file whose images come in blocks; equal content gives equal bytes, however it is cut into blocks."""

    def __init__(self, path: Path, labels: np.ndarray, ids: np.ndarray, resolution: tuple[int, int]) -> None:
        """`labels` and `ids`: int64 [rows], rows > 0."""
        assert labels.shape == ids.shape == (len(labels),), (labels.shape, ids.shape)
        self.shape, self.layout = (len(labels), *resolution, 3), layout_of(len(labels), resolution)
        self.pointers = self.layout.pointers(len(labels))
        self.rows = 0
        self.file = HashedFile(path)
        header = np.array((VERSION, len(FIELDS), self.layout.page_bytes, len(labels), self.layout.table_at), HEADER)
        records = np.zeros(len(labels), RECORD)
        records["mode"], records["pointer"] = RAW_MODE, self.pointers
        records["height"], records["width"] = resolution
        records["label"], records["index"] = labels, ids
        for content in (header, FIELDS, records):
            self.file.write(content.tobytes())

    def write(self, images: np.ndarray) -> None:
        """The next rows, uint8 [m, H, W, 3]."""
        assert (images.dtype, images.shape[1:]) == (np.uint8, self.shape[1:]), (images.dtype, images.shape)
        assert self.rows + len(images) <= self.shape[0], (self.rows, len(images), self.shape)
        per_page, done = self.layout.page_bytes // self.layout.image_bytes, 0
        while done < len(images):
            count = min(len(images) - done, per_page - self.rows % per_page)
            self.file.write(bytes(int(self.pointers[self.rows]) - self.file.bytes))
            self.file.write(images[done : done + count].tobytes())
            self.rows, done = self.rows + count, done + count

    def finish(self) -> dict[str, Any]:
        """Force everything to the disk; `bytes` and `sha256` of the file. Too few rows are a fault of ours."""
        assert self.rows == self.shape[0], (self.rows, self.shape)
        table = np.zeros(self.rows, ENTRY)
        table["row"], table["pointer"], table["bytes"] = np.arange(self.rows), self.pointers, self.layout.image_bytes
        self.file.write(table.tobytes())
        assert self.file.bytes == self.layout.file_bytes, (self.file.bytes, self.layout)
        return self.file.finish()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self.file.close()


@dataclass(frozen=True)
class Beton:
    """A file whose structure has been checked; its pixels are mapped only while they are read."""

    path: Path
    resolution: tuple[int, int]
    labels: np.ndarray
    """int64 [rows]."""
    ids: np.ndarray
    """int64 [rows], the sample id of each row."""
    pointers: np.ndarray
    """int64 [rows], where each image begins."""

    def images(self, rows: np.ndarray | None = None) -> np.ndarray:
        """uint8 [n, H, W, 3] of row numbers, in their order; of all rows for None."""
        pointers = self.pointers if rows is None else self.pointers[rows]
        shape = (*self.resolution, 3)
        mapped = np.memmap(self.path, np.uint8, "r")
        return np.lib.stride_tricks.sliding_window_view(mapped, math.prod(shape))[pointers].reshape(-1, *shape)


def open_beton(path: str | Path) -> Beton:
    """A file with the three fields above and images of one size, whoever wrote it.

    Nothing is mapped and nothing beyond the file is allocated before its header, records and table agree; ValueError
    names the file and the rule that is broken. Pixels, labels and ids carry no redundancy: their digest is elsewhere.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such .beton file; prepare again")
    try:
        with path.open("rb") as file:
            return _checked(path, file, os.fstat(file.fileno()).st_size)
    except _Broken as broken:
        raise ValueError(f"{path}: {broken}; the file is damaged or no .beton of this kind, prepare again") from None


class _Broken(Exception):
    """A rule of the format that does not hold."""


def _checked(path: Path, file: BinaryIO, size: int) -> Beton:
    _require(size >= RECORDS_AT, f"header and fields need {RECORDS_AT} bytes, the file has {size}")
    header = _read(file, HEADER, 1)[0]
    _require(header["version"] == VERSION, f"version must be {VERSION}; got {header['version']}")
    _require(header["fields"] == len(FIELDS), f"there must be {len(FIELDS)} fields; got {header['fields']}")
    fields = _read(file, FIELD, len(FIELDS))
    _require(fields.tobytes() == FIELDS.tobytes(), f"fields must be image, label, index; got {fields['name'].tolist()}")
    page_bytes, rows, table_at = int(header["page_bytes"]), int(header["rows"]), int(header["table_at"])
    smallest, largest = PAGE_BYTES_RANGE
    power = page_bytes & (page_bytes - 1) == 0 and smallest <= page_bytes <= largest
    _require(power, f"the page size must be a power of two in {smallest}..{largest}; got {page_bytes}")
    records_end = RECORDS_AT + rows * RECORD.itemsize
    _require(rows > 0, "there must be a row; the header says 0")
    _require(records_end <= table_at, f"records end at {records_end}, behind the allocation table at {table_at}")
    expected = table_at + rows * ENTRY.itemsize
    _require(size == expected, f"{rows} rows and a table at {table_at} make {expected} bytes; the file has {size}")
    records = _read(file, RECORD, rows)
    file.seek(table_at)
    table = _read(file, ENTRY, rows)

    _require((records["mode"] == RAW_MODE).all(), "every image must be raw (mode 1)")
    height, width = int(records["height"][0]), int(records["width"][0])
    _require(min(height, width) > 0, f"images must have pixels; the first is {height} x {width}")
    same = (records["height"] == height) & (records["width"] == width)
    _require(same.all(), f"every image must be {height} x {width}, as the first is")
    _require(not records["padding"].any(), "padding of records must be zero")
    image_bytes, pointers = height * width * 3, records["pointer"].astype(np.int64)  # from 2**63 on negative
    inside = (records_end <= pointers) & (pointers <= table_at - image_bytes)
    _require(inside.all(), "every image must lie between the records and the table")
    _require((pointers % page_bytes <= page_bytes - image_bytes).all(), "no image may cross the end of a page")
    _require((np.diff(np.sort(pointers)) >= image_bytes).all(), "images must not overlap")

    order = table["row"].astype(np.int64)
    _require(np.array_equal(np.sort(order), np.arange(rows)), "the table must name every row once")
    _require((table["pointer"] == records["pointer"][order]).all(), "table and records must point to the same images")
    _require((table["bytes"] == image_bytes).all(), f"every image must have {image_bytes} bytes in the table")
    labels, ids = (records[field].astype(np.int64) for field in ("label", "index"))
    return Beton(path, (height, width), labels, ids, pointers)


def _require(holds: bool | np.bool_, rule: str) -> None:
    if not holds:
        raise _Broken(rule)


def _read(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    content = file.read(count * dtype.itemsize)
    _require(len(content) == count * dtype.itemsize, "the file became shorter while it was read")
    return np.frombuffer(content, dtype)
