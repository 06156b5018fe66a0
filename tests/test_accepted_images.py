"""What is refused of images by default and taken when a flag says so, and files that are left out and listed."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semi_fast.cli import main
from semi_fast.data_prep.readers import decoding, ilsvrc, image_file
from semi_fast.data_prep.readers.decoding import BadImagesError, decoded_blocks
from semi_fast.data_prep.readers.image_file import Accepted, Recipe
from semi_fast.data_prep.subset import inputs_digest
from semi_fast.prepared.manifest import load_manifest, verify_manifest

from .synthetic_data import write_cifar10_binary, write_ilsvrc, write_image_folder, write_imagenet_batches
from .test_readers import RGB, decode, encoded

ODD = ("new\nline.png", "größe und leer.png", os.fsdecode(b"not\xffutf8.png"), 'comma, "quoted".png')


def prepare(raw: Path, *flags: str, dataset: str = "folder") -> int:
    return main(["prepare", dataset, "--raw", str(raw), "--out", str(raw.parent / "data"), "--resolution", "8", *flags])


def bad_files(data: Path) -> dict[str, str]:
    with (data / "bad.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "reason"]
    return {name: reason for name, reason in rows}


def test_bad_files_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", per_class=150, unlabeled=5, side=8)
    whole = sorted((raw / "train" / "dog").iterdir())
    for name in ODD:
        (raw / "train" / "dog" / name).write_bytes(b"nothing")
    assert prepare(raw) == 2
    assert "4 files are no usable images" in capsys.readouterr().err
    assert prepare(raw, "--on-bad", "skip") == 0
    assert f"warning: 4 files were left out, see {tmp_path / 'data' / 'bad.csv'}" in capsys.readouterr().err
    manifest = load_manifest(tmp_path / "data")
    verify_manifest(manifest)
    assert manifest.counts["train"] == (150, 150, 150)
    expected = np.stack([np.asarray(Image.open(path)) for path in whole])
    assert np.array_equal(manifest.images("train")[150:300], expected)
    assert bad_files(tmp_path / "data") == {
        f"train/dog/{name}": "not an image in a format that is read" for name in ODD
    }
    assert manifest.source["left_out"] == 4
    assert manifest.command.endswith("--resolution 8 --on-bad skip --out data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "raw"]


def test_more_than_one_percent_is_never_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", per_class=30, test_per_class=3, side=8)  # 99 files
    (raw / "train" / "dog" / "0030.png").write_bytes(b"")
    assert prepare(raw, "--on-bad", "skip") == 2
    assert "--on-bad skip leaves out at most 1% of 99 files; 1 files are no usable images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(raw / "test" / "cat" / "z.png")  # the hundredth
    assert prepare(raw, "--on-bad", "skip") == 0


@pytest.mark.parametrize("dataset", ["folder", "imagenet127"])
def test_what_may_be_left_out_must_not_empty_a_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    write = write_ilsvrc if dataset == "imagenet127" else write_image_folder
    raw = write(tmp_path / "raw", per_class=100)
    emptied = sorted((raw / "train").iterdir())[1]
    for path in sorted(emptied.iterdir())[1:]:
        path.unlink()
    (bad,) = emptied.iterdir()
    bad.write_bytes(b"nothing")
    assert prepare(raw, "--on-bad", "skip", dataset=dataset) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("semi-fast: --on-bad skip must leave no folder empty; without them ")
    assert emptied.name in line
    assert f"1 files are no usable images, repair or remove them: {str(bad)!r}: not an image" in line
    assert "bad.csv" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_without_bad_files_nothing_is_listed(tmp_path: Path) -> None:
    assert prepare(write_image_folder(tmp_path / "raw", side=8), "--on-bad", "skip") == 0
    assert not (tmp_path / "data" / "bad.csv").exists()


@pytest.mark.parametrize("val", ["folders", "ground_truth"])
def test_bad_files_of_ilsvrc_are_left_out(tmp_path: Path, val: str) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=100, val=val, size=(8, 8))
    (path,) = [p for p in (raw / "val").rglob("*.JPEG") if p.name == "ILSVRC2012_val_00000003.JPEG"]
    path.with_name("ILSVRC2012_val_00000004.JPEG").write_bytes(path.read_bytes())
    if val == "ground_truth":
        labels = raw / ilsvrc.GROUND_TRUTH
        labels.write_text(labels.read_text() + labels.read_text().splitlines()[2] + "\n")
    first = min((raw / "train" / "n01440764").iterdir())
    for bad in (path, first):
        bad.write_bytes(b"\xff\xd8\xff")
    assert prepare(raw, "--on-bad", "skip", dataset="imagenet127") == 0
    manifest = load_manifest(tmp_path / "data")
    assert (manifest.length("train"), manifest.length("test")) == (299, 3)
    assert set(bad_files(tmp_path / "data")) == {str(bad.relative_to(raw)) for bad in (path, first)}


def test_a_subset_lists_what_the_whole_set_left_out(tmp_path: Path) -> None:
    raw = write_image_folder(tmp_path / "raw", per_class=40, side=8)
    (raw / "train" / "dog" / "x.png").write_bytes(b"")
    assert prepare(raw, "--on-bad", "skip", "--labeled-fraction", "0.5") == 0
    assert bad_files(tmp_path / "data") == {"train/dog/x.png": "empty file"}


def deep_png(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values))


def test_of_sixteen_bits_the_upper_eight_are_taken() -> None:
    values = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1820
    with pytest.raises(ValueError, match=r"more than 8 bits; --scale16 takes 8 of 16"):
        decode(deep_png(values), 6)
    found = decode(deep_png(values), 6, Accepted(scale16=True))
    assert np.array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))
    colours = np.arange(108, dtype=np.uint16).reshape(6, 6, 3) * 606
    ppm = b"P6 6 6 65535\n" + colours.astype(">u2").tobytes()
    found = decode(ppm, 6, Accepted(scale16=True)).astype(int)
    assert np.abs(found - colours / 257).max() <= 1
    floats = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="pixels of mode F"):
        decode(floats, 4, Accepted(scale16=True))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [RGB.quantize(16).convert("RGB"), RGB.rotate(90)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with pytest.raises(ValueError, match="animated or with 2 pages; --first-frame takes the first"):
        decode(content, 6)
    assert np.array_equal(decode(content, 6, Accepted(first_frame=True)), np.asarray(frames[0]))


def test_links_out_of_the_folder_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", side=8)
    pictures = write_image_folder(tmp_path / "elsewhere", side=8, seed=5)
    for part in ("train", "test"):
        (raw / part / "fox").symlink_to(pictures / part / "dog")
    assert prepare(raw) == 2
    said = capsys.readouterr().err
    assert "links must lead to files inside" in said
    assert "followed out of it with --follow" in said
    assert prepare(raw, "--follow") == 0
    assert load_manifest(tmp_path / "data").class_names == ("cat", "dog", "emu", "fox")
    (raw / "train" / "cat" / "x.png").symlink_to(raw / "nothing")
    assert main(["prepare", "folder", "--raw", str(raw), "--out", str(tmp_path / "d"), "--follow"]) == 2
    assert "links must lead to files; these do not" in capsys.readouterr().err


def test_the_flags_reach_the_decoding_processes(tmp_path: Path) -> None:
    raw = write_ilsvrc(tmp_path / "raw", per_class=2)
    train = raw / "train" / "n01440764"
    (train / "deep.png").write_bytes(deep_png(np.full((4, 4), 0x8000, np.uint16)))
    (train / "moving.gif").write_bytes(encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]))
    assert prepare(raw, dataset="imagenet127") == 2
    assert prepare(raw, "--scale16", "--first-frame", dataset="imagenet127") == 0
    manifest = load_manifest(tmp_path / "data")
    assert manifest.length("train") == 8
    assert "--scale16 --first-frame" in manifest.command
    assert (manifest.images("train") == 128).all(axis=(1, 2, 3)).sum() == 1


def test_data_sets_without_image_files_refuse_the_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_cifar10_binary(tmp_path / "raw", 1)
    flags = ["--raw", str(raw), "--out", str(tmp_path / "data"), "--follow"]
    assert main(["prepare", "cifar10", *flags]) == 2
    assert "prepare cifar10 reads no image files; leave out --follow" in capsys.readouterr().err
    raw = write_imagenet_batches(tmp_path / "batches")
    assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(tmp_path / "d"), "--on-bad", "skip"]) == 2
    assert "the downsampled batches hold no image files; leave out --on-bad skip" in capsys.readouterr().err


def test_images_that_become_rgb_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", side=8)
    for number, mode in enumerate(("L", "RGBA", "L")):
        (raw / "train" / "cat" / f"odd{number}.png").write_bytes(encoded(RGB.convert(mode)))
    (raw / "test" / "dog" / "odd.tiff").write_bytes(encoded(RGB.convert("CMYK"), "TIFF"))
    assert prepare(raw) == 0
    assert "note: 4 images were converted to RGB (CMYK 1, L 2, RGBA 1)" in capsys.readouterr().err
    assert load_manifest(tmp_path / "data").source["converted_to_rgb"] == {"CMYK": 1, "L": 2, "RGBA": 1}


def test_hidden_files_are_ignored_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_image_folder(tmp_path / "raw", side=8)
    (raw / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (raw / "test" / ".thumbnails").mkdir()
    assert prepare(raw) == 0
    assert "note: 2 hidden files, or leftovers of file managers, were ignored" in capsys.readouterr().err
    assert load_manifest(tmp_path / "data").source["hidden_files_ignored"] == 2


LEFTOVERS = ("Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "Icon\r", "THUMBS.DB")


@pytest.mark.parametrize("dataset", ["folder", "imagenet127"])
def test_what_a_file_manager_leaves_is_no_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    flat = dataset == "imagenet127"
    raw = write_ilsvrc(tmp_path / "raw", val="solution") if flat else write_image_folder(tmp_path / "raw", unlabeled=4)
    folders = [raw / "train", min((raw / "train").iterdir()), raw / "val" if flat else raw / "unlabeled" / "deep"]
    before = inputs_digest("", raw)
    for folder in folders:
        for name in LEFTOVERS:
            if name.lower().endswith((".db", ".ini", "\r")):
                (folder / name).write_bytes(b"x")
            else:
                (folder / name).mkdir()
                (folder / name / "thumbnail.jpg").write_bytes(b"x")
    assert prepare(raw, dataset=dataset) == 0
    assert f"note: {3 * len(LEFTOVERS)} hidden files, or leftovers of file managers, were" in capsys.readouterr().err
    assert load_manifest(tmp_path / "data").source["hidden_files_ignored"] == 3 * len(LEFTOVERS)
    assert inputs_digest("", raw) == before, "a killed preparation goes on"


def fatal(rgb: Image.Image, resolution: int) -> Image.Image:
    """What a decoder with a fault does to the process: with 3 x 3 pixels it crashes, with 4 x 4 it never ends, until an
    alarm that was set, and is brought forward here."""
    if rgb.size == (3, 3):
        os.kill(os.getpid(), signal.SIGSEGV)
    if rgb.size == (4, 4):
        assert signal.alarm(1) > 0
        time.sleep(3600)
    return rgb.resize((resolution, resolution))


def test_a_file_that_ends_its_decoder_is_named(tmp_path: Path) -> None:
    names = [f"{i:03d}.png" for i in range(4 * decoding.CHUNK_IMAGES)]
    for name in names:
        Image.new("RGB", (8, 8), (int(name[:3]) % 256, 2, 3)).save(tmp_path / name)
    for name, side in ((names[5], 3), (names[100], 4)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    source = {"files": len(names)}
    with pytest.raises(BadImagesError, match="ended its decoder, or took it more than 120 s") as caught:
        list(decoded_blocks(tmp_path, {"train": names}, Recipe(fatal, 2), source))
    assert list(caught.value.bad) == [tmp_path / names[5], tmp_path / names[100]]
    good = [name for name in names if name not in (names[5], names[100])]
    rows = np.concatenate([rows for _, rows in decoded_blocks(tmp_path, {"train": good}, Recipe(fatal, 2), source)])
    assert rows[:, 0, 0, 0].tolist() == [int(name[:3]) for name in good]


UNGUARDED = """
import sys
from pathlib import Path
from semi_fast.data_prep.readers.decoding import decoded_blocks
from semi_fast.data_prep.readers.image_file import Recipe
from semi_fast.data_prep.readers.image_folder import cropped
list(decoded_blocks(Path(sys.argv[1]), {"train": ["a.png"]}, Recipe(cropped, 4), {"files": 1}))
"""


def test_processes_that_do_not_start_are_no_fault_of_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED)
    end = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "RuntimeError: the processes that decode images do not start" in end.stderr
    assert "if __name__ == '__main__'" in end.stderr


def test_a_decoding_process_has_limited_memory() -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=decoding._prepare_process) as pool:
        limit, _ = pool.submit(resource.getrlimit, resource.RLIMIT_AS).result()
        assert decoding.MEMORY_LIMIT_BYTES < limit < 3 * decoding.MEMORY_LIMIT_BYTES
        with pytest.raises(MemoryError):
            pool.submit(bytearray, decoding.MEMORY_LIMIT_BYTES + 2**20).result()


def test_an_image_of_64_megapixels_fits_into_that_memory() -> None:
    context = multiprocessing.get_context("spawn")
    content = encoded(Image.new("RGBA", (8000, 8000), (200, 100, 50, 128)), compress_level=1)
    with ProcessPoolExecutor(1, mp_context=context, initializer=decoding._prepare_process) as pool:
        found = pool.submit(image_file.decode, content, Recipe(ilsvrc.boxed, 4)).result()
    assert found.tolist() == [[[100, 50, 25]] * 4] * 4


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (b"\x89PNG\r\n\x1a\n", (0, 5)),
        (b"<?xml version='1.0'?><svg/>", None),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", None),
    ],
    ids=["0x5", "SVG", "HEIC"],
)
def test_what_only_looks_like_an_image_is_refused(content: bytes, size: tuple[int, int] | None) -> None:
    if size:
        body = encoded(Image.new("RGB", (5, 5)))
        content = body[:16] + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + body[24:]
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode(content, 4)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_an_image_of_one_pixel_a_side_is_an_image(size: tuple[int, int]) -> None:
    assert (decode(encoded(Image.new("RGB", size, (9, 8, 7))), 4) == [9, 8, 7]).all()


def test_the_content_of_a_file_says_what_it_is(tmp_path: Path) -> None:
    raw = write_image_folder(tmp_path / "raw", side=8)
    path = raw / "train" / "cat" / "0000.png"
    path.write_bytes(encoded(Image.open(path), "BMP"))
    path.rename(path.with_name("0000.txt"))
    assert prepare(raw) == 0


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_imagenet_batches(tmp_path / "raw", npz=True)
    path = raw / "Imagenet8_train_npz" / "train_data_batch_7.npz"
    np.savez_compressed(path, data=np.zeros((3000, 192), np.uint8), labels=np.ones(3000, np.int64))
    with zipfile.ZipFile(path) as archive:
        found = archive.getinfo("data.npy")
        assert found.file_size > 200 * found.compress_size
    assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 2
    assert "unpacks to more than 200 times its size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside.npy", "/outside.npy"])
def test_an_archive_is_never_unpacked(tmp_path: Path, name: str) -> None:
    """Whatever else stands in it: two entries are read by their names, and no file is made."""
    raw = write_imagenet_batches(tmp_path / "raw", npz=True)
    path = raw / "Imagenet8_train_npz" / "train_data_batch_7.npz"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    assert main(["prepare", "imagenet127", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "raw"]


def test_raw_data_in_an_archive_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar.tar.gz").write_bytes(io.BytesIO(b"x").getvalue())
    assert main(["prepare", "cifar10", "--raw", str(tmp_path / "cifar.tar.gz"), "--out", str(tmp_path / "data")]) == 2
    assert "--raw must be a directory" in capsys.readouterr().err
