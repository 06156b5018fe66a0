"""TFRecord files of labeled images, written and read without TensorFlow.

A record is the length of its payload (uint64), the masked CRC32C of the length (uint32), the payload and its masked
CRC32C, all little endian. The payload is a tf.train.Example with the features `image` (one byte string), `index` and
`label` (one int64 each), serialised as protocol buffers do deterministically: keys sorted, shortest varints, numbers
packed. The index file beside it is DALI's: a line `offset size` of every record.
"""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semi_fast.prepared.hashed_file import HashedFile

POLYNOMIAL = 0x82F63B78  # Castagnoli's, lowest bit = highest power
BLOCK = 512  # bytes looked up at once; the table is then half a MiB and stays in the cache
HEAD_BYTES, TAIL_BYTES = 12, 4
RECORD_OVERHEAD_BYTES = 104  # a record takes no more beside its image
INDEX_LINE_BYTES = 38  # two numbers of at most 18 digits, a space and a line end
IMAGE_OPENING = (b"\n", b"\n", b"\n\x05image\x12", b"\n", b"\n")  # what precedes each nested length, outermost first
SCALAR_OPENING_BYTES = 15


def _byte_table() -> np.ndarray:
    """uint32 [256]: the CRC register after one byte, from zero."""
    register = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        register = register >> 1 ^ np.where(register & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return register


def _position_table() -> np.ndarray:
    """uint32 [BLOCK * 256]: what a byte at a position of a block adds to the register behind the block."""
    table = np.empty((BLOCK, 256), np.uint32)
    table[-1] = byte = _byte_table()
    for i in range(BLOCK - 2, -1, -1):
        table[i] = byte[table[i + 1] & 255] ^ table[i + 1] >> 8
    return table.ravel()


def _start() -> bytes:
    """The four bytes that turn a register of zeros into one of ones, with which a CRC32C begins."""
    register = 0xFFFFFFFF
    for _ in range(32):
        register = ((register ^ POLYNOMIAL) << 1 | 1) & 0xFFFFFFFF if register >> 31 else register << 1
    return register.to_bytes(4, "little")


TABLE = _position_table()
POSITIONS = np.arange(BLOCK) * 256
REGISTER = TABLE[: 4 * 256].reshape(4, 256).tolist()  # a register is the first four bytes of the next block
START = _start()


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) as iSCSI and TFRecord use it."""
    padding = -(len(START) + len(data)) % BLOCK  # zeros in front leave a register of zeros as it is
    blocks = np.frombuffer(b"".join((bytes(padding), START, data)), np.uint8).reshape(-1, BLOCK)
    a, b, c, d = REGISTER
    register = 0
    for remainder in _remainders(blocks).tolist():
        register = remainder ^ a[register & 255] ^ b[register >> 8 & 255] ^ c[register >> 16 & 255] ^ d[register >> 24]
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """A CRC as TFRecord stores it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class RecordFile:
    """A TFRecord file and its index, written front to back."""

    def __init__(self, path: Path):
        self.path = path
        self.file = HashedFile(path)
        self.lines: list[str] = []

    def write(self, image: bytes, label: int, sample_id: int) -> None:
        """Append a record."""
        payload = _example(image, label, sample_id)
        length = len(payload).to_bytes(8, "little")
        record = b"".join((length, _checksum(length), payload, _checksum(payload)))
        self.lines.append(f"{self.file.bytes} {len(record)}\n")
        self.file.write(record)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the index, force both files to the disk; `bytes` and `sha256` of each by its name."""
        with closing(HashedFile(index_path(self.path))) as index:
            index.write("".join(self.lines).encode("ascii"))
            return {self.path.name: self.file.finish(), index_path(self.path).name: index.finish()}

    def close(self) -> None:
        self.file.close()


class Example(NamedTuple):
    """What a record says."""

    image: bytes
    label: int
    sample_id: int


class Records:
    """The records of one file by number, in memory-mapped bytes; made by `open_records`."""

    def __init__(self, path: Path, data: np.ndarray, records: np.ndarray, images: np.ndarray):
        self.path, self.data = path, data
        self.records, self.images = records, images
        """int64 [n, 2]: first byte and number of bytes, of the whole record and of its image."""

    def __len__(self) -> int:
        return len(self.records)

    def image(self, i: int) -> np.ndarray:
        """uint8 [bytes], read-only: the image of a record as it stands in the file."""
        first, size = self.images[i]
        return self.data[first : first + size]

    def example(self, i: int) -> Example:
        """All of a record; ValueError when it is not one that `RecordFile` writes."""
        first, size = self.records[i]
        image_end = self.images[i].sum()
        rest = self.data[image_end : first + size - TAIL_BYTES].tobytes()
        try:
            sample_id, at = _read_varint(rest, SCALAR_OPENING_BYTES)
            label, _ = _read_varint(rest, at + SCALAR_OPENING_BYTES)
        except IndexError:
            sample_id = label = 0
        if rest != _scalar(b"index", sample_id) + _scalar(b"label", label):
            raise ValueError(f"{self.path}: record {i} is no image with an index and a label; prepare again")
        return Example(self.image(i).tobytes(), label, sample_id)


def open_records(path: Path, *, rows: int, num_bytes: int) -> Records:
    """A file of `RecordFile` with so many records and bytes, memory-mapped.

    ValueError, before anything else reads the file, unless it has that size, its index divides all of it into `rows`
    records, and every record's lengths are right: that of the payload, with its checksum, and those around the image.
    The payload's own checksum is for other readers: here the SHA-256 of the file in the manifest tells.
    """
    if not path.is_file():
        raise ValueError(f"{path}: named by the manifest, but missing; prepare again")
    size = path.stat().st_size
    if size != num_bytes or not rows:
        raise ValueError(f"{path}: must have {rows} records in {num_bytes} bytes, has {size} bytes; prepare again")
    records = _read_index(index_path(path), rows, size)
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    first, sizes = records.T
    heads = data[first[:, None] + np.arange(HEAD_BYTES)]
    payloads = np.ascontiguousarray(heads[:, :8]).view("<u8")[:, 0]
    checksums = np.ascontiguousarray(heads[:, 8:]).view("<u4")[:, 0]
    bad = (payloads != (sizes - HEAD_BYTES - TAIL_BYTES).astype(np.uint64)) | (checksums != _checksums(heads[:, :8]))
    if bad.any():
        raise ValueError(f"{path}: the length of record {bad.argmax()} is damaged; prepare again")
    return Records(path, data, records, _find_images(path, data, records))


def index_path(path: Path) -> Path:
    return path.with_suffix(".idx")


def _read_index(path: Path, rows: int, size: int) -> np.ndarray:
    """int64 [rows, 2]: offset and size of each record, which follow each other and fill `size` bytes."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; prepare again")
    if path.stat().st_size > rows * INDEX_LINE_BYTES:
        raise ValueError(f"{path}: must list {rows} records, has {path.stat().st_size} bytes; prepare again")
    text = path.read_bytes()
    if text.count(b"\n") != rows or not re.fullmatch(rb"(?:\d{1,18} \d{1,18}\n)*", text):
        raise ValueError(f"{path}: must have {rows} lines `offset size`; damaged, prepare again")
    records = np.array(text.split(), dtype="S18").astype(np.int64).reshape(rows, 2)
    ends = records.sum(axis=1)
    smallest = HEAD_BYTES + TAIL_BYTES
    if (records[:, 1] < smallest).any() or (records[:, 0] != np.append(0, ends[:-1])).any() or ends[-1] != size:
        raise ValueError(f"{path}: its records must follow each other and fill {size} bytes; damaged, prepare again")
    return records


def _find_images(path: Path, data: np.ndarray, records: np.ndarray) -> np.ndarray:
    """int64 [n, 2]: first byte and size of each image; all lengths that enclose it lie inside one another."""
    at = records[:, 0] + HEAD_BYTES
    limit = records.sum(axis=1) - TAIL_BYTES
    length, fits = limit - at, np.ones(len(records), bool)
    for depth, opening in enumerate(IMAGE_OPENING):
        for byte in opening:
            fits &= data.take(at, mode="clip") == byte
            at = at + 1
        length, at = _read_varints(data, at)
        fits &= at + length == limit if depth in (0, 2, 3, 4) else at + length < limit
        limit = np.minimum(at + length, limit)
    if not fits.all():
        raise ValueError(f"{path}: record {fits.argmin()} does not begin with an image; damaged, prepare again")
    return np.stack([at, length], axis=1)


def _read_varints(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers below 2^35 at these positions, int64 [n], and the positions behind them."""
    value, more = np.zeros_like(at), np.ones(len(at), bool)
    for shift in range(0, 35, 7):
        byte = np.where(more, data.take(at, mode="clip"), 0).astype(np.int64)
        value |= (byte & 127) << shift
        at = at + more
        more = byte > 127
    return value, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The int64 at a position, and the position behind it."""
    value = shift = 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    value |= data[at] << shift
    return value - 2**64 if value >> 63 else value, at + 1


def _example(image: bytes, label: int, sample_id: int) -> bytes:
    feature = _nested(b"\n", _nested(b"\n", image))  # Feature.bytes_list, BytesList.value
    entry = _nested(b"\n", _nested(b"\n\x05image\x12", feature))
    return _nested(b"\n", entry + _scalar(b"index", sample_id) + _scalar(b"label", label))


def _scalar(name: bytes, value: int) -> bytes:
    """An entry of the feature map: one int64 under a name of five letters."""
    feature = _nested(b"\x1a", _nested(b"\n", _varint(value % 2**64)))  # Feature.int64_list, Int64List.value, packed
    return _nested(b"\n", b"\n\x05" + name + _nested(b"\x12", feature))


def _nested(opening: bytes, content: bytes) -> bytes:
    return b"".join((opening, _varint(len(content)), content))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _remainders(blocks: np.ndarray) -> np.ndarray:
    """uint32 [k]: the register behind each row of uint8 [k, w <= BLOCK], from zero."""
    return np.bitwise_xor.reduce(TABLE.take(blocks + POSITIONS[BLOCK - blocks.shape[1] :]), axis=1)


def _checksum(data: bytes | memoryview) -> bytes:
    return masked(crc32c(data)).to_bytes(4, "little")


def _checksums(rows: np.ndarray) -> np.ndarray:
    """The masked CRC32C of each row of uint8 [n, w], uint32 [n]; w <= BLOCK - 4."""
    start = np.broadcast_to(np.frombuffer(START, np.uint8), (len(rows), len(START)))
    crc = ~_remainders(np.concatenate([start, rows], axis=1))
    return (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)
