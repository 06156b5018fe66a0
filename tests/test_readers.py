"""Readers: CIFAR's layouts, image folders and digits give the right pixels, and bad input gives its name."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semi_fast.cli import main
from semi_fast.data_prep.readers import Raw, check_count, cifar, image_file
from semi_fast.data_prep.readers.cifar import read_cifar
from semi_fast.data_prep.readers.digits import read_digits
from semi_fast.data_prep.readers.image_file import Accepted, Recipe
from semi_fast.data_prep.readers.image_folder import cropped, read_image_folder
from semi_fast.data_prep.restricted_unpickler import load_dict
from tests.synthetic_data import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    cifar_sets,
    images_of,
    python2_pickle,
    rows_chw,
    write_cifar10_binary,
    write_cifar10_python,
    write_cifar100_binary,
    write_cifar100_python,
    write_image_folder,
)


def pixels(raw: Raw) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for part, block in raw.blocks:
        parts.setdefault(part, []).append(block)
    return {part: np.concatenate(blocks) for part, blocks in parts.items()}


@pytest.mark.parametrize(
    ("dataset", "write", "per_class", "names"),
    [
        ("cifar10", write_cifar10_python, 7, CIFAR10_NAMES),
        ("cifar10", write_cifar10_binary, 7, CIFAR10_NAMES),
        ("cifar100", write_cifar100_python, 2, CIFAR100_NAMES),
        ("cifar100", write_cifar100_binary, 2, CIFAR100_NAMES),
    ],
)
def test_every_cifar_layout_gives_the_pixels_and_labels_in_file_order(
    tmp_path: Path, dataset: str, write, per_class: int, names: tuple[str, ...]
) -> None:
    write(tmp_path, per_class, 3, test_per_class=2)
    (folder,) = tmp_path.iterdir()
    sets = cifar_sets(len(names), per_class, 2, 3)
    for raw_path in (tmp_path, folder):
        raw = read_cifar(dataset, raw_path)
        assert (raw.class_names, raw.resolution, raw.num_unlabeled) == (names, (32, 32), 0)
        for part, array in pixels(raw).items():
            assert array.dtype == np.uint8
            assert np.array_equal(array, sets[part][0])
            assert np.array_equal(raw.labels[part], sets[part][1])


def test_binary_is_read_where_both_layouts_are(tmp_path: Path) -> None:
    write_cifar10_binary(write_cifar10_python(tmp_path, 1), 1)
    assert read_cifar("cifar10", tmp_path).source["reader"] == "cifar binary"


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_batches_pickled_by_python_3_are_read(tmp_path: Path, protocol: int) -> None:
    write_cifar10_python(tmp_path, 1, dumps=lambda value: pickle.dumps(value, protocol=protocol))
    assert np.array_equal(pixels(read_cifar("cifar10", tmp_path))["train"], cifar_sets(10, 1, 5, 0)["train"][0])


class Payload:
    def __init__(self, call: Callable[..., Any], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call, self.arguments


NOT_A_BATCH = {
    "system": (b"cos\nsystem\n(S'touch sentinel'\ntR.", "it asks for os.system"),
    "eval": (b"c__builtin__\neval\n(S'1'\ntR.", "it asks for __builtin__.eval"),
    "huge ndarray": (b"cnumpy\nndarray\n(I1000000000000\ntR.", "not callable"),
    "huge rebuild": (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9999999999\ntS'b'\ntR.", "made empty"),
    "object dtype": (b"cnumpy\ndtype\n(S'O'\nI0\nI1\ntR.", "only uint8 arrays are read; got dtype b'O'"),
    "codec": (b"c_codecs\nencode\n(Va\nVzlib\ntR.", "only latin1 text"),
    "frombuffer": (pickle.dumps({"data": np.zeros(4, np.uint8)}, protocol=5), "opcode|_frombuffer"),
    "memo bomb": (b"}r\xff\xff\xff\x7f.", "memo number 2147483647 in 7 bytes"),
    "persistent id": (b"Px\n.", "opcode PERSID"),
    "extension": (b"\x82\x01.", "opcode EXT1"),
    "instance": (b"(ios\nsystem\n.", "opcode INST"),
    "not a dict": (pickle.dumps([1]), "holds a list"),
    "two pickles": (pickle.dumps({}) * 2, "after the end"),
    "unhashable key": (b"}(]K\x02u.", "unhashable"),
    "empty": (b"", "."),
    "text": (b"<!DOCTYPE html>", "."),
}


@pytest.mark.parametrize("name", NOT_A_BATCH)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, reason = NOT_A_BATCH[name]
    message = rf"^some/batch: damaged, truncated or not a pickled batch \(.*({reason}).*\); get the file again$"
    with pytest.raises(ValueError, match=message):
        load_dict(Path("some/batch"), content)
    assert list(tmp_path.iterdir()) == []


def test_a_payload_made_by_pickle_itself_is_not_run(tmp_path: Path) -> None:
    content = pickle.dumps({b"data": Payload(os.mkdir, str(tmp_path / "sentinel"))})
    with pytest.raises(ValueError, match=r"it asks for posix.mkdir"):
        load_dict(tmp_path / "batch", content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")  # from pickletools, of a damaged text
def test_damaged_batches_are_refused_or_read_as_a_dict_and_nothing_else(tmp_path: Path) -> None:
    batch = {b"labels": [1, 2], b"data": np.zeros((2, 12), np.uint8), b"filenames": [b"a", b"b"]}
    content = python2_pickle(batch)
    assert set(load_dict(tmp_path, content)) == {"labels", "data", "filenames"}
    for end in range(len(content)):
        with pytest.raises(ValueError, match="damaged, truncated"):
            load_dict(tmp_path, content[:end])
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        try:
            loaded = load_dict(tmp_path, bytes(damaged))
        except ValueError:
            refused += 1
        else:
            assert isinstance(loaded, dict)
    assert refused > 300


def change_batch(path: Path, change: dict[bytes, Any]) -> None:
    batch = {key.encode(): value for key, value in load_dict(path, path.read_bytes()).items()} | change
    path.write_bytes(python2_pickle({key: value for key, value in batch.items() if value is not None}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": None}, "no entry 'data'"),
        ({b"labels": None}, "no entry 'labels'"),
        ({b"data": [1, 2]}, r"data must be uint8 \[n, 3072\]; got list"),
        ({b"data": np.zeros((8, 3071), np.uint8)}, r"must be uint8 \[n, 3072\]; got uint8 \(8, 3071\)"),
        ({b"data": np.zeros(3072, np.uint8)}, r"must be uint8 \[n, 3072\]; got uint8 \(3072,\)"),
        ({b"data": np.zeros((8, 3072), np.float32)}, "only uint8 arrays are read"),
        ({b"labels": [0] * 7}, "one label for each of 8 images; got 7"),
        ({b"labels": "x"}, "one label for each of 8 images; got str"),
        (
            {b"labels": [0, 10, -1, "2", None, True, b"3", 0]},
            r"0..9; 6 are not \(row 1: 10, row 2: -1, row 3: '2', row 4",
        ),
    ],
)
def test_a_bad_batch_is_named(tmp_path: Path, change: dict[bytes, Any], message: str) -> None:
    path = write_cifar10_python(tmp_path, 4) / "cifar-10-batches-py" / "data_batch_3"
    change_batch(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        read_cifar("cifar10", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("write", "dataset", "file", "change", "message"),
    [
        (write_cifar10_python, "cifar10", "data_batch_5", None, "missing; cifar10 needs data_batch_1"),
        (write_cifar10_python, "cifar10", "test_batch", None, "missing"),
        (write_cifar10_python, "cifar10", "batches.meta", None, "missing"),
        (write_cifar10_python, "cifar10", "data_batch_2", lambda b: b[:-100], "damaged, truncated"),
        (
            write_cifar10_python,
            "cifar10",
            "batches.meta",
            lambda b: b.replace(b"bird", b"ship"),
            "10 different classes; got 9",
        ),
        (
            write_cifar10_python,
            "cifar10",
            "batches.meta",
            lambda b: python2_pickle({b"label_names": 3}),
            "list of text",
        ),
        (write_cifar10_binary, "cifar10", "data_batch_5.bin", None, "missing"),
        (write_cifar10_binary, "cifar10", "data_batch_2.bin", lambda b: b[:-1], "multiple of 3073 bytes; got"),
        (
            write_cifar10_binary,
            "cifar10",
            "test_batch.bin",
            lambda b: b"\x0a" + b[1:],
            r"0..9; 1 are not \(row 0: 10\)",
        ),
        (write_cifar10_binary, "cifar10", "batches.meta.txt", lambda b: b[:40], "10 different classes"),
        (write_cifar100_python, "cifar100", "train", lambda b: b[:-100], "damaged, truncated"),
        (write_cifar100_python, "cifar100", "meta", None, "missing"),
        (write_cifar100_binary, "cifar100", "train.bin", lambda b: b[:-1], "multiple of 3074 bytes"),
        (
            write_cifar100_binary,
            "cifar100",
            "test.bin",
            lambda b: b"\0\x64" + b[2:],
            r"0..99; 1 are not \(row 0: 100\)",
        ),
    ],
)
def test_a_missing_or_damaged_cifar_file_is_named(
    tmp_path: Path, write, dataset: str, file: str, change, message
) -> None:
    write(tmp_path, 2)
    (folder,) = tmp_path.iterdir()
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        read_cifar(dataset, tmp_path)
    assert str(folder / file) in str(caught.value)


def test_a_directory_without_cifar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold cifar-100-binary/ or cifar-100-python/"):
        read_cifar("cifar100", write_cifar10_python(tmp_path, 1))


def decode(content: bytes, resolution: int, accepted: Accepted = image_file.REFUSED) -> np.ndarray:
    """As a folder of images is read."""
    return image_file.decode(content, Recipe(cropped, resolution, accepted))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = Image.fromarray(images_of(np.array([0]), 6, 0)[0])


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_an_image_of_the_right_size_keeps_its_pixels(kind: str) -> None:
    image = RGB.quantize(16).convert("RGB") if kind == "GIF" else RGB
    assert np.array_equal(decode(encoded(image, kind), 6), np.asarray(image))


def test_every_mode_becomes_rgb_by_the_stated_rule() -> None:
    grey = np.asarray(RGB.convert("L"))
    assert np.array_equal(decode(encoded(RGB.convert("L")), 6), np.stack([grey] * 3, axis=2))
    bits = RGB.convert("1")
    assert np.array_equal(decode(encoded(bits), 6), np.asarray(bits.convert("RGB")))
    palette = RGB.quantize(8)
    assert np.array_equal(decode(encoded(palette), 6), np.asarray(palette.convert("RGB")))
    cmyk = RGB.convert("CMYK")
    assert np.array_equal(decode(encoded(cmyk, "TIFF"), 6), np.asarray(cmyk.convert("RGB")))


def test_transparency_lies_over_black() -> None:
    alpha = Image.fromarray(np.array([[0, 255], [51, 102]], np.uint8))
    white = Image.new("RGB", (2, 2), (250, 100, 50))
    white.putalpha(alpha)
    expected = [[[0, 0, 0], [250, 100, 50]], [[50, 20, 10], [100, 40, 20]]]
    assert decode(encoded(white), 2).tolist() == expected
    grey = Image.merge("LA", (Image.new("L", (2, 2), 200), alpha))
    assert decode(encoded(grey), 2)[..., 0].tolist() == [[0, 200], [40, 80]]
    keyed = Image.new("RGB", (2, 2), (9, 9, 9))
    keyed.putpixel((0, 0), (200, 1, 1))
    assert decode(encoded(keyed, transparency=(200, 1, 1)), 2).tolist() == [[[0] * 3, [9] * 3], [[9] * 3, [9] * 3]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter to be upright
    assert np.array_equal(decode(encoded(RGB, exif=exif), 6), np.rot90(np.asarray(RGB), -1))


def test_the_short_side_is_resized_with_an_antialiased_filter_and_the_centre_kept() -> None:
    wide = Image.fromarray(images_of(np.array([0]), 24, 0)[0, :8])
    whole = np.asarray(wide.resize((12, 4), Image.Resampling.BICUBIC))
    assert np.abs(decode(encoded(wide), 4).astype(int) - whole[:, 4:8]).max() <= 1
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert np.abs(decode(encoded(tall), 4).astype(int) - np.rot90(whole)[4:8]).max() <= 1
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    smooth = decode(encoded(Image.fromarray(checks.astype(np.uint8))), 8)
    assert smooth.min() > 110
    assert smooth.max() < 145  # nearest or plain bicubic would give 0 and 255


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _rgb16_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


REFUSED = {
    "16-bit grey PNG": (encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "more than 8 bits"),
    "16-bit RGB PNG": (_rgb16_png(), "more than 8 bits"),
    "16-bit PPM": (b"P6 2 2 65535\n" + bytes(24), "more than 8 bits"),
    "float TIFF": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "more than 8 bits"),
    "animated GIF": (encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), "animated"),
    "animated WebP": (encoded(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(90)]), "animated"),
    "animated PNG": (encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]), "animated"),
    "65 megapixels": (_png_header(6500, 10_000), "more than 64 megapixels"),
    "100 megapixels": (_png_header(10_000, 10_000), "more than 64 megapixels"),
    "1 terapixel": (_png_header(1_000_000, 1_000_000), "decompression bomb"),
    "pixels missing": (_png_header(8, 8), "."),
    "truncated JPEG": (encoded(RGB.resize((64, 64)), "JPEG")[:-200], "truncated"),
    "truncated PNG": (encoded(RGB)[:-60], "."),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "EPS": (encoded(RGB, "EPS"), "not an image"),
    "text": (b"hello", "not an image"),
    "empty": (b"", "empty file"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_8_bit_still_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = REFUSED[name]
    path = write_image_folder(tmp_path, per_class=1, test_per_class=1) / "train" / "dog" / "0001.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        pixels(read_image_folder(tmp_path, 4))
    assert f"1 files are no usable images, repair or remove them (or --on-bad skip): {str(path)!r}" in str(caught.value)


def test_damaged_images_never_raise_anything_else(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, ("a", "b"), 1, test_per_class=1)
    rng = np.random.default_rng(0)
    originals = [encoded(RGB.resize((16, 16)), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]
    for i in range(300):
        damaged = bytearray(originals[i % len(originals)])
        for position in rng.integers(0, len(damaged), 3):
            damaged[position] = rng.integers(0, 256)
        (root / "train" / "a" / f"{i}").write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"^\d+ files are no usable images"):
        pixels(read_image_folder(root, 4))


def test_twenty_bad_files_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, per_class=9, unlabeled=5)
    for path in sorted((root / "train").rglob("*.png"))[:20] + sorted((root / "unlabeled").rglob("*.png"))[:3]:
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"^23 files .*; and 3 more$") as caught:
        pixels(read_image_folder(root, 4))
    assert str(caught.value).count("not an image") == 20


@pytest.mark.parametrize("test", ["test", "val"])
def test_an_image_folder_is_read_in_the_order_of_its_names(tmp_path: Path, test: str) -> None:
    names = ("größe", "with space", "日本")
    root = write_image_folder(tmp_path / "data", names, 2, test_per_class=1, unlabeled=4, side=5, test=test)
    (root / "train" / names[0] / ".hidden").write_text("no image")
    (root / "train" / ".cache").mkdir()
    raw = read_image_folder(root, 5)
    arrays = pixels(raw)
    order = [sorted(names).index(name) for name in names]
    assert raw.class_names == tuple(sorted(names))
    assert raw.labels["train"].tolist() == [0, 0, 1, 1, 2, 2]
    expected = images_of(np.repeat(np.arange(3), 2), 5, 0)
    for position, k in enumerate(order):
        assert np.array_equal(arrays["train"][2 * k : 2 * k + 2], expected[2 * position : 2 * position + 2])
    unlabeled = images_of(np.arange(4) % 3, 5, 2000)
    assert np.array_equal(arrays["unlabeled"], unlabeled[[0, 2, 1, 3]])  # files, then those under deep/
    assert (raw.num_unlabeled, raw.source["files"], len(raw.source["sha256"])) == (4, 13, 64)


NAMES = ("größe", "日本", "\uff01", "apple")
OTHER_LOCALE = """
import pathlib, sys
from semi_fast.cli import main
root = pathlib.Path(sys.argv[1])
assert sys.getfilesystemencoding() == "ascii", "the locale is another one"
assert main(["prepare", "folder", "--raw", str(root / "raw"), "--out", str(root / "ascii" / "data"),
             "--resolution", "4", "--on-bad", "skip"]) == 0
"""


def test_the_locale_is_no_part_of_the_data(tmp_path: Path) -> None:
    """Names of classes, the order of files, the manifest's texts and bad.csv."""
    raw = write_image_folder(tmp_path / "größe" / "raw", NAMES, 30, test_per_class=1, side=4)
    (raw / "train" / NAMES[0] / "größe.png").write_bytes(b"nothing")
    flags = ["--resolution", "4", "--on-bad", "skip"]
    assert main(["prepare", "folder", "--raw", str(raw), "--out", str(raw.parent / "utf8" / "data"), *flags]) == 0
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", OTHER_LOCALE, str(raw.parent)]
    done = subprocess.run(words, env=os.environ | plain, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("manifest.json", "bad.csv"):
        ours, theirs = ((raw.parent / locale / "data" / name).read_bytes() for locale in ("utf8", "ascii"))
        assert ours == theirs, name


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "raw", (os.fsdecode(b"not\xffutf8"), "dog"), 1, test_per_class=1, side=4)
    with pytest.raises(ValueError, match=r"not\\udcffutf8': the name of a class must be UTF-8; rename the folder"):
        read_image_folder(root, 4)


def test_long_paths_work(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 15)
    root = write_image_folder(deep / "data", ("k" * 255, "größe " * 30), 1, test_per_class=1, side=4)
    assert len(str(root)) > 3000
    assert pixels(read_image_folder(root, 4))["train"].shape == (2, 4, 4, 3)


def test_the_digest_of_a_folder_covers_names_and_content(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path)
    first, renamed = root / "train" / "cat" / "0000.png", root / "train" / "cat" / "0000.gif"
    digests = set()
    for change in (lambda: None, lambda: first.rename(renamed), lambda: renamed.write_bytes(encoded(RGB))):
        change()
        raw = read_image_folder(root, 4)
        pixels(raw)
        digests.add(raw.source["sha256"])
    assert len(digests) == 3


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: shutil.rmtree(r / "train"), "has no train/"),
        (lambda r: shutil.rmtree(r / "test"), "has neither"),
        (lambda r: (r / "val").mkdir(), "has both"),
        (lambda r: (r / "train" / "fox").mkdir(), "class 'fox' has no image"),
        (lambda r: shutil.rmtree(r / "test" / "dog"), "must hold the same classes; test/ lacks 'dog'$"),
        (lambda r: shutil.rmtree(r / "train" / "dog"), "must hold the same classes; train/ lacks 'dog'$"),
        (lambda r: (r / "train" / "emu").rename(r / "train" / "Emu"), "train/ lacks 'emu'; test/ lacks 'Emu'$"),
        (
            lambda r: shutil.copytree(r / "train" / "dog", r / "train" / "DOG"),
            "differ in more than case; '.*DOG', '.*dog'",
        ),
        (
            lambda r: shutil.copy(r / "train" / "dog" / "0006.png", r / "train"),
            "one folder per class; .*0006.png' are files",
        ),
        (lambda r: (r / "train" / "dog" / "sub").mkdir(), "regular files; 1 are folders or devices: .*sub"),
        (lambda r: os.mkfifo(r / "train" / "dog" / "pipe"), "regular files; 1 are folders or devices: .*pipe"),
        (
            lambda r: _link(r / "train" / "dog" / "x.png", Path("/etc/hostname")),
            "links must lead to files inside .*x.png",
        ),
        (lambda r: _link(r / "train" / "dog" / "x.png", r / "nothing"), "links must lead to files inside .*x.png"),
        (lambda r: _link(r / "train" / "dog" / "x.png", Path("x.png")), "links must lead to files inside .*x.png"),
        (lambda r: _link(r / "train" / "fox", r.parent), "links must lead to files inside .*fox"),
        (lambda r: (r / "unlabeled").mkdir(), "holds no image"),
        (lambda r: ((r / "unlabeled").mkdir(), _link(r / "unlabeled" / "all", r)), "regular files; 1 are folders"),
    ],
)
def test_a_folder_that_breaks_a_rule_is_refused(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    root = write_image_folder(tmp_path / "data")
    change(root)
    with pytest.raises(ValueError, match=message):
        read_image_folder(root, 4)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, side=4)
    path = root / "train" / "dog" / "0006.png"
    _link(path, root / "train" / "cat" / "0000.png")
    arrays = pixels(read_image_folder(root, 4))
    assert np.array_equal(arrays["train"][6], arrays["train"][0])


def test_digits_are_the_bundled_ones_with_a_fixed_balanced_test_part() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    raw, again = read_digits(8), read_digits(8)
    arrays = pixels(raw)
    assert np.bincount(raw.labels["test"]).tolist() == [45] * 10
    assert len(raw.labels["train"]) + len(raw.labels["test"]) == 1797
    assert all(np.array_equal(arrays[part], other) for part, other in pixels(again).items())
    bunch = load_digits()
    exact = np.rint(bunch.data * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    together = np.concatenate([arrays["train"], arrays["test"]])[..., 0]
    assert sorted(map(bytes, together)) == sorted(map(bytes, exact)), "each image once, in exactly one part"
    position = {bytes(image): i for i, image in enumerate(exact)}
    rows = [position[bytes(image)] for image in arrays["train"][..., 0]]
    assert rows == sorted(rows)
    assert np.array_equal(bunch.target[rows], raw.labels["train"])
    assert np.array_equal(arrays["train"][..., 0], arrays["train"][..., 2])
    assert pixels(read_digits(16))["test"].shape == (450, 16, 16, 3)


def test_rows_chw_is_the_layout_that_the_readers_undo() -> None:
    images = images_of(np.array([0, 1]), 32, 0)
    assert rows_chw(images)[1, 1024 + 32 * 3 + 5] == images[1, 3, 5, 1]


@pytest.mark.parametrize(
    ("write", "dataset", "file", "published", "images"),
    [
        (write_cifar10_binary, "cifar10", "data_batch_3.bin", 10_000, {"train": 200, "test": 50}),
        (write_cifar10_python, "cifar10", "data_batch_3", 10_000, {"train": 200, "test": 50}),
        (write_cifar100_binary, "cifar100", "train.bin", 50_000, {"train": 300, "test": 100}),
        (write_cifar100_python, "cifar100", "train", 50_000, {"train": 300, "test": 100}),
    ],
)
def test_a_cifar_file_cut_between_two_images_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, dataset: str, file: str, published: int, images: dict
) -> None:
    """What is left is a whole file in every other respect: only the published number of images tells."""
    monkeypatch.setattr(cifar, "check_count", check_count)
    write(tmp_path)
    (folder,) = tmp_path.iterdir()
    path, rows = folder / file, images["train"] * published // 50_000
    with pytest.raises(ValueError, match=f"must hold {published} images; got {rows}: not the published file"):
        read_cifar(dataset, tmp_path)
    monkeypatch.setattr(cifar, "IMAGES", images)
    read_cifar(dataset, tmp_path)
    if path.suffix == ".bin":
        path.write_bytes(path.read_bytes()[: -(path.stat().st_size // rows)])
    else:
        batch = load_dict(path, path.read_bytes())
        key = "labels" if dataset == "cifar10" else "fine_labels"
        change_batch(path, {b"data": batch["data"][:-1], key.encode(): batch[key][:-1]})
    with pytest.raises(ValueError, match=f"{path}: must hold {rows} images; got {rows - 1}: not the published file"):
        read_cifar(dataset, tmp_path)
