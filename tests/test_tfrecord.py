"""TFRecord files: checksums of the standard, what was written is read back, any damage is refused; the shards."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers import dali
from semi_fast.prepared.tfrecord import (
    BLOCK,
    INDEX_LINE_BYTES,
    RECORD_OVERHEAD_BYTES,
    Example,
    RecordFile,
    Records,
    crc32c,
    index_path,
    masked,
    open_records,
)

EXAMPLES = [Example(b"abc", 7, 300), Example(b"", -1, 2**40), Example(b"z" * 90, 0, 0)]


def write_records(path: Path, examples: list[Example]) -> int:
    """A file of these records; its size."""
    file = RecordFile(path)
    for example in examples:
        file.write(*example)
    written = file.finish()
    file.close()
    for name, entry in written.items():
        content = path.with_name(name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return path.stat().st_size


def crc_bit_by_bit(data: bytes) -> int:
    """CRC-32C as the standard defines it: the remainder of a polynomial division, lowest bit first."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this one and the next: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (bytes.fromhex("01c00000" + "00" * 12 + "14000000000004000000001400000018" + "28" + "00" * 7 + "02" + "00" * 7),
         0xD9963A56),
    ],
)  # fmt: skip
def test_the_checksum_gives_the_answers_of_the_standard(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc
    assert crc32c(memoryview(data)) == crc


@given(st.integers(0, 4 * BLOCK), st.integers(0, 255))
def test_the_checksum_is_the_remainder_for_every_length(length: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(length)
    assert crc32c(data) == crc_bit_by_bit(data)


def test_a_checksum_is_stored_rotated_and_moved() -> None:
    assert masked(0) == 0xA282EAD8
    assert masked(0xFFFFFFFF) == 0xA282EAD7
    assert masked(0x00008000) == 0xA282EAD9


def test_the_bytes_are_those_of_the_formats(tmp_path: Path) -> None:
    """A record put together by hand from the definitions of TFRecord and tf.train.Example."""
    path = tmp_path / "a.tfrecord"
    write_records(path, [Example(b"xy", -1, 300)])
    image = b"\x0a\x05image" + b"\x12\x06" + b"\x0a\x04" + b"\x0a\x02xy"
    index = b"\x0a\x05index" + b"\x12\x06" + b"\x1a\x04" + b"\x0a\x02\xac\x02"
    label = b"\x0a\x05label" + b"\x12\x0e" + b"\x1a\x0c" + b"\x0a\x0a" + b"\xff" * 9 + b"\x01"
    features = b"".join(b"\x0a" + bytes([len(entry)]) + entry for entry in (image, index, label))
    payload = b"\x0a" + bytes([len(features)]) + features
    length = struct.pack("<Q", len(payload))
    crcs = (struct.pack("<I", masked(crc_bit_by_bit(part))) for part in (length, payload))
    assert path.read_bytes() == length + next(crcs) + payload + next(crcs)
    assert index_path(path).read_text() == f"0 {16 + len(payload)}\n"


def all_of(records: Records) -> list[Example]:
    return [records.example(i) for i in range(len(records))]


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.builds(Example, st.binary(max_size=300), INT64, INT64), min_size=1, max_size=8))
def test_what_was_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> None:
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    num_bytes = write_records(path, examples)
    assert num_bytes <= sum(len(e.image) + RECORD_OVERHEAD_BYTES for e in examples)
    assert index_path(path).stat().st_size <= INDEX_LINE_BYTES * len(examples)
    records = open_records(path, rows=len(examples), num_bytes=num_bytes)
    assert all_of(records) == examples
    assert [records.image(i).tobytes() for i in range(len(records))] == [e.image for e in examples]


@pytest.mark.parametrize("size", [0, 1, 93, 94, 95, 127, 128, 16383, 16384, 70_000, 2_100_000])
def test_images_of_every_size_are_found(tmp_path: Path, size: int) -> None:
    """On both sides of where a nested length takes another byte."""
    path = tmp_path / "a.tfrecord"
    examples = [Example(np.random.default_rng(i).bytes(n), i, i) for i, n in enumerate((size, 5, size))]
    num_bytes = write_records(path, examples)
    records = open_records(path, rows=3, num_bytes=num_bytes)
    assert all_of(records) == examples
    assert not records.image(0).flags.writeable


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "a.tfrecord"
    return path, write_records(path, EXAMPLES)


def reason(path: Path, num_bytes: int) -> str:
    """Why the file is refused; empty when it is not."""
    try:
        open_records(path, rows=len(EXAMPLES), num_bytes=num_bytes)
    except ValueError as error:
        return str(error)
    return ""


def refused(path: Path, num_bytes: int) -> bool:
    text = reason(path, num_bytes)
    return text.startswith(str(path.with_suffix(""))) and text.endswith("prepare again")


def test_every_changed_byte_of_structure_is_refused(written: tuple[Path, int]) -> None:
    """Of lengths, their checksums and what leads to the image; the rest is the manifest's SHA-256's matter."""
    path, num_bytes = written
    content = path.read_bytes()
    assert reason(path, num_bytes) == ""
    records = open_records(path, rows=len(EXAMPLES), num_bytes=num_bytes)
    for (first, _), (image, _) in zip(records.records.tolist(), records.images.tolist(), strict=True):
        for i in range(first, image):
            bit = 1 << i % 8
            path.write_bytes(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
            assert refused(path, num_bytes), (i, bit)


def test_every_changed_byte_of_an_index_is_refused(written: tuple[Path, int]) -> None:
    path, num_bytes = written
    content = index_path(path).read_bytes()
    for i in range(len(content)):
        for byte in b"0 9\n-\x00" + bytes([content[i] ^ 1]):
            index_path(path).write_bytes(content[:i] + bytes([byte]) + content[i + 1 :])
            assert refused(path, num_bytes) != (byte == content[i]), (i, byte)


def test_every_truncation_is_refused(written: tuple[Path, int]) -> None:
    path, num_bytes = written
    for file in (index_path(path), path):
        content = file.read_bytes()
        for size in range(len(content)):
            file.write_bytes(content[:size])
            assert refused(path, num_bytes)
            if file == path:
                assert refused(path, size), "with a manifest that agrees to the size"
        file.write_bytes(content)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def other_order(path: Path) -> None:
    lines = index_path(path).read_text().splitlines(keepends=True)
    index_path(path).write_text("".join(reversed(lines)))


def overflowing(path: Path) -> None:
    index_path(path).write_text(f"0 {10**18 - 1}\n" * len(EXAMPLES))


def huge(path: Path) -> None:
    index_path(path).write_bytes(b"0" * 10_000)


def merged(path: Path) -> None:
    """An index whose last record is shorter than its own head."""
    size, second = path.stat().st_size, int(index_path(path).read_text().split()[2])
    index_path(path).write_text(f"0 {second}\n{second} {size - second - 5}\n{size - 5} 5\n")


def one_record_split_in_two(path: Path) -> None:
    """An index with the right number of lines that fill the file, of which two are wrong."""
    offsets = [int(line.split()[0]) for line in index_path(path).read_text().splitlines()]
    ends = [*offsets[1:], path.stat().st_size]
    ends[0] += 1
    index_path(path).write_text("".join(f"{a} {b - a}\n" for a, b in zip([0, *ends[:-1]], ends, strict=True)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (longer, "must have 3 records in"),
        (lambda path: path.write_bytes(b""), "must have 3 records in"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "length of record 0 is damaged"),
        (lambda path: path.unlink(), "named by the manifest, but missing"),
        (lambda path: index_path(path).unlink(), r"a\.idx: missing"),
        (lambda path: longer(index_path(path)), "must have 3 lines"),
        (other_order, "must follow each other"),
        (overflowing, "must follow each other"),
        (merged, "must follow each other"),
        (huge, "must list 3 records, has 10000 bytes"),
        (one_record_split_in_two, "length of record 0 is damaged"),
    ],
)
def test_damage_is_named(written: tuple[Path, int], damage: Callable[[Path], object], message: str) -> None:
    path, num_bytes = written
    damage(path)
    with pytest.raises(ValueError, match=message):
        open_records(path, rows=len(EXAMPLES), num_bytes=num_bytes)


def test_a_record_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    num_bytes = write_records(path, [Example(b"abc", 1, i) for i in range(3)])
    first, _, last = index_path(path).read_text().splitlines(keepends=True)
    index_path(path).write_text(first + first + last)
    with pytest.raises(ValueError, match="must follow each other"):
        open_records(path, rows=3, num_bytes=num_bytes)


@pytest.mark.parametrize("rows", [0, 2, 4])
def test_another_number_of_rows_is_refused(written: tuple[Path, int], rows: int) -> None:
    path, num_bytes = written
    with pytest.raises(ValueError, match=r"must (have|list) \d (records|lines)"):
        open_records(path, rows=rows, num_bytes=num_bytes)


def sealed(path: Path, payload: bytes) -> int:
    """A file of one record with right checksums around any payload; its size."""
    parts = (struct.pack("<Q", len(payload)), payload)
    record = b"".join(part + struct.pack("<I", masked(crc32c(part))) for part in parts)
    path.write_bytes(record)
    index_path(path).write_text(f"0 {len(record)}\n")
    return len(record)


def nested(opening: bytes, content: bytes, lacking: int = 0) -> bytes:
    """A field of fewer than 128 bytes; its length is `lacking` too small."""
    return opening + bytes([len(content) - lacking]) + content


def payload_of(lacking: tuple[int, ...]) -> bytes:
    """An Example whose nested lengths, outermost first, are too small by this."""
    image = nested(b"\x0a", nested(b"\x0a", b"abcde", lacking[4]), lacking[3])
    entry = nested(b"\x0a", b"\x0a\x05image" + nested(b"\x12", image, lacking[2]), lacking[1])
    scalars = b"".join(nested(b"\x0a", nested(b"\x0a", name) + b"\x12\x05\x1a\x03\x0a\x01\x05")
                       for name in (b"index", b"label"))  # fmt: skip
    return nested(b"\x0a", entry + scalars, lacking[0])


def test_lengths_that_do_not_enclose_each_other_are_refused_with_right_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    num_bytes = sealed(path, payload_of((0, 0, 0, 0, 0)))
    assert all_of(open_records(path, rows=1, num_bytes=num_bytes)) == [Example(b"abcde", 5, 5)]
    for level in range(5):
        for lacking in (-100, -1, 1, 2, 4):
            num_bytes = sealed(path, payload_of(tuple(lacking * (i == level) for i in range(5))))
            with pytest.raises(ValueError, match="record 0 does not begin with an image"):
                open_records(path, rows=1, num_bytes=num_bytes)


@pytest.mark.parametrize("payload", [b"", b"\x0a\x00", b"\x0a\x05\x0a\x03abc", b"\x0a" + b"\xff" * 9 + b"\x01"])
def test_a_record_that_is_no_image_is_refused_with_right_checksums(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "a.tfrecord"
    num_bytes = sealed(path, payload)
    with pytest.raises(ValueError, match="record 0 does not begin with an image"):
        open_records(path, rows=1, num_bytes=num_bytes)


@pytest.mark.parametrize("rest", [b"\x0a\x00", b"\xff" * 40, b"\x0a\x05index"])
def test_a_record_without_index_and_label_is_refused_where_they_are_read(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "a.tfrecord"
    image = b"\x0a\x05image" + nested(b"\x12", nested(b"\x0a", nested(b"\x0a", b"abcde")))
    num_bytes = sealed(path, nested(b"\x0a", nested(b"\x0a", image) + rest))
    records = open_records(path, rows=1, num_bytes=num_bytes)
    assert records.image(0).tobytes() == b"abcde"
    with pytest.raises(ValueError, match="record 0 is no image with an index and a label"):
        records.example(0)


def raw_of(images: np.ndarray, train: int, test: int) -> Raw:
    """`images` as a raw data set of three classes: so many of train, of test, the rest unlabeled."""
    labels = {"train": np.arange(train) % 3, "test": np.arange(test) % 3}
    parts = np.split(images, [train, train + test])
    halves = [(p, h) for p, rows in zip(("train", "test", "unlabeled"), parts, strict=True)
              for h in np.array_split(rows, 2) if len(h)]  # fmt: skip
    names = ("a", "b", "c")
    return Raw("images", names, images.shape[1:3], labels, len(images) - train - test, iter(halves), {})


def written_by(writer: dali.DaliWriter, raw: Raw) -> dict[str, dict]:
    for part, block in raw.blocks:
        writer.write(part, block)
    entries = writer.finish()
    writer.close()
    return entries


def decoded(image: bytes, image_format: str, shape: tuple[int, ...]) -> np.ndarray:
    if image_format == "raw":
        return np.frombuffer(image, np.uint8).reshape(shape)
    return np.asarray(Image.open(io.BytesIO(image), formats=[image_format]))


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
def test_shards_hold_every_row_once_under_its_id(tmp_path: Path, natural_images: np.ndarray, image_format: str) -> None:
    raw = raw_of(natural_images, 31, 12)
    writer = dali.DaliWriter(raw, tmp_path, image_format=image_format, shard_rows=10)
    entries = written_by(writer, raw)
    shards = [name for name in entries if name.endswith(".tfrecord")]
    assert shards == [
        f"dali/{part}-{i:05d}-of-{n:05d}.tfrecord"
        for part, n in (("train", 4), ("test", 2), ("unlabeled", 2)) for i in range(n)
    ]  # fmt: skip
    assert set(entries) == {f"dali/{path.name}" for path in (tmp_path / "dali").iterdir()}
    rows = dict.fromkeys(("train", "test", "unlabeled"), 0)
    total = 0
    for name in shards:
        entry, index = entries[name], entries[name.replace(".tfrecord", ".idx")]
        part = entry["part"]
        assert entry.keys() == {"format", "part", "rows", "first", "bytes", "sha256", "image_format"}
        assert {k: v for k, v in entry.items() if k not in ("bytes", "sha256")} == {
            k: v for k, v in index.items() if k not in ("bytes", "sha256")
        }
        assert (entry["format"], entry["image_format"], entry["first"]) == ("dali", image_format, rows[part])
        total += entry["bytes"] + index["bytes"]
        for e in (name, name.replace(".tfrecord", ".idx")):
            assert entries[e]["sha256"] == hashlib.sha256((tmp_path / e).read_bytes()).hexdigest()
        records = open_records(tmp_path / name, rows=entry["rows"], num_bytes=entry["bytes"])
        for image, label, sample_id in all_of(records):
            row = rows[part]
            place = {"train": 0, "test": 31, "unlabeled": 43}[part] + row
            assert label == (-1 if part == "unlabeled" else row % 3)
            assert sample_id == (row + 31 if part == "unlabeled" else row)
            difference = decoded(image, image_format, natural_images.shape[1:]) - natural_images[place].astype(int)
            assert abs(difference).mean() <= (4 if image_format == "jpeg" else 0)
            rows[part] += 1
    assert rows == {"train": 31, "test": 12, "unlabeled": 17}
    assert total <= dali.needed_bytes(raw, image_format)


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
def test_the_bytes_do_not_depend_on_the_run_or_the_blocks(
    tmp_path: Path, natural_images: np.ndarray, image_format: str
) -> None:
    entries = []
    for name, rows in (("a", 1), ("b", 7)):
        (tmp_path / name).mkdir()
        raw = raw_of(natural_images, 31, 12)
        writer = dali.DaliWriter(raw, tmp_path / name, image_format=image_format, shard_rows=10)
        for part, block in raw.blocks:
            for start in range(0, len(block), rows):
                writer.write(part, block[start : start + rows])
        entries.append(writer.finish())
    assert entries[0] == entries[1]


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("side", [4, 9, 32, 100])
def test_the_estimate_of_disk_space_holds_for_noise(tmp_path: Path, image_format: str, side: int) -> None:
    """Which no compression makes smaller; black and white noise is the worst case for JPEG."""
    noise = np.random.default_rng(side).integers(0, 256, (6, side, side, 3), dtype=np.uint8)
    raw = raw_of(noise if image_format != "jpeg" else np.where(noise < 128, 0, 255).astype(np.uint8), 3, 3)
    writer = dali.DaliWriter(raw, tmp_path, image_format=image_format, quality=100)
    assert sum(entry["bytes"] for entry in written_by(writer, raw).values()) <= dali.needed_bytes(raw, image_format)


def test_a_writer_refuses_what_it_cannot_write(tmp_path: Path, natural_images: np.ndarray) -> None:
    raw = raw_of(natural_images, 31, 12)
    with pytest.raises(ValueError, match="the image format must be one of raw, png, jpeg; got 'gif'"):
        dali.DaliWriter(raw, tmp_path, image_format="gif")
    with pytest.raises(ValueError, match=r"quality must be in 1\.\.100; got 0"):
        dali.DaliWriter(raw, tmp_path, quality=0)
    with pytest.raises(ValueError, match="at least one row; got 0"):
        dali.DaliWriter(raw, tmp_path, shard_rows=0)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_gives_too_few_or_too_many_rows_is_noticed(tmp_path: Path, natural_images: np.ndarray) -> None:
    for name, rows in (("few", 30), ("many", 32)):
        (tmp_path / name).mkdir()
        writer = dali.DaliWriter(raw_of(natural_images, 31, 29), tmp_path / name)
        with pytest.raises(AssertionError):  # noqa: PT012, either call may notice
            writer.write("train", natural_images[:rows])
            writer.finish()
        writer.close()
        assert writer.shard is None or writer.shard.file.file.closed
