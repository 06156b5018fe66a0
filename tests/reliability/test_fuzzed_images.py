"""Image files with damage of every kind: each is stored the same whenever it is read, or named with a reason."""

from __future__ import annotations

import csv
import hashlib
import resource
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from semi_fast.cli import main
from semi_fast.data_prep import prepare
from semi_fast.data_prep.readers.image_file import Accepted, Recipe, read_image
from semi_fast.data_prep.readers.image_folder import cropped
from semi_fast.prepared.manifest import load_manifest, verify_manifest
from tests.reliability.figures import amount, record
from tests.reliability.forked import forked
from tests.synthetic_data import images_of, write_image_folder

CHILD_FILES = 100
SECONDS = 60.0
"""For the files of one child; some tens of milliseconds are usual for one."""
MEMORY_BYTES = 2**31
"""On top of what is mapped already: several copies of the largest image that is accepted."""
RESOLUTION = 8
ACCEPTED = Accepted(scale16=True, first_frame=True)
KINDS = ("truncated", "bits", "zeros", "splice", "sizes", "bytes", "repeated")


pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much that is refused here


def originals() -> list[tuple[str, bytes]]:
    """(kind, content) of small pictures in every format and mode that is read."""
    rgb = Image.fromarray(images_of(np.array([0]), 40, 0)[0])
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 20}
    wanted: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {"quality": 90, "exif": exif}),
        (rgb, "JPEG", {"progressive": True, "subsampling": 2}),
        (rgb.convert("CMYK"), "JPEG", {"restart_marker_blocks": 2}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb, "PNG", {}),
        (rgba, "PNG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (rgb, "PNG", frames),
        (rgb.quantize(64), "GIF", {}),
        (rgb.quantize(8), "GIF", frames | {"append_images": [rgb.rotate(90).quantize(8)]}),
        (rgb, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "tiff_deflate", "tiffinfo": {317: 2}}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (deep, "TIFF", {}),
        (rgb, "BMP", {}),
        (rgb.quantize(16), "BMP", {}),
        (rgb, "WEBP", {"quality": 80}),
        (rgba, "WEBP", {"lossless": True}),
        (rgb, "WEBP", frames),
        (rgb, "PPM", {}),
        (rgba, "ICO", {}),
        (rgb, "PCX", {}),
        (rgb, "SGI", {}),
        *([(rgb, "JPEG2000", {})] if features.check("jpg_2000") else []),
        *([(rgb, "AVIF", {})] if features.check("avif") else []),
    ]
    found = []
    for image, kind, options in wanted:
        file = BytesIO()
        image.save(file, kind, **options)
        found.append((kind, file.getvalue()))
    return found


def mutated(seed: int, pictures: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """(what was done, content) of the file of this seed; PNG chunks get their checksums back in half of the cases."""
    rng = np.random.default_rng(seed)
    kind, whole = pictures[seed % len(pictures)]
    content, what = bytearray(whole), KINDS[int(rng.integers(len(KINDS)))]
    header = min(len(content), 400)

    def place(length: int = 1, end: int = len(content)) -> int:
        return int(rng.integers(0, max(1, end - length)))

    if what == "truncated":
        del content[place() :]
    elif what == "bits":
        for _ in range(rng.integers(1, 9)):
            content[place()] ^= 1 << int(rng.integers(8))
    elif what == "zeros":
        length = int(rng.integers(1, 200))
        at = place(length)
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif what == "splice":
        other = pictures[int(rng.integers(len(pictures)))][1]
        cut = int(rng.integers(len(other)))
        content[place() :] = other[cut:]
    elif what == "sizes":  # numbers of two or four bytes near the beginning become huge, in either byte order
        for _ in range(rng.integers(1, 4)):
            order, width = rng.choice(["<", ">"]), int(rng.integers(2))
            number = int(rng.choice([0, 1, 8_000, 16_000, 32_767, 65_535, 2**20, 2**31 - 1, 2**32 - 1]))
            value = struct.pack(f"{order}{'HI'[width]}", number % 2 ** (16 * (width + 1)))
            at = place(len(value), header)
            content[at : at + len(value)] = value
    elif what == "bytes":
        length = int(rng.integers(1, 60))
        at = place(length, header)
        content[at : at + length] = rng.bytes(len(content[at : at + length]))
    else:
        first, last = sorted((place(), place()))
        content[first:first] = content[first:last] * int(rng.integers(1, 4))
    if kind == "PNG" and rng.integers(2):
        mend_checksums(content)
    return f"{kind}, {what}", bytes(content)


def mend_checksums(content: bytearray) -> None:
    at = 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(content):
            return
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def animated(content: bytes) -> bool:
    with Image.open(BytesIO(content)) as image:
        return getattr(image, "n_frames", 1) > 1


def decoded(content: bytes, path: Path) -> str:
    """Digest of the pixels, or why the file is refused; anything else that happens is raised."""
    path.write_bytes(content)
    pixels = read_image(path, Recipe(cropped, RESOLUTION, ACCEPTED)).pixels
    return f"refused: {pixels}" if isinstance(pixels, str) else hashlib.sha256(pixels.tobytes()).hexdigest()


def test_the_originals_are_read_and_mutations_differ(tmp_path: Path) -> None:
    pictures = originals()
    for kind, content in pictures:
        assert not decoded(content, tmp_path / "image").startswith("refused"), kind
        for share in (0.3, 0.9):  # of an animation the first frame may still be whole
            what = decoded(content[: int(share * len(content))], tmp_path / "image")
            assert what.startswith("refused") or (share > 0.5 and animated(content)), f"{kind}, cut to {share}"
    files = [mutated(seed, pictures) for seed in range(200)]
    assert files == [mutated(seed, pictures) for seed in range(200)], "a seed makes one file"
    whole = {content for _, content in pictures}
    assert sum(content in whole for _, content in files) < 10
    assert {what.split(", ")[1] for what, _ in files} == set(KINDS)


def test_damaged_images_are_decoded_alike_or_refused(tmp_path: Path) -> None:
    files, pictures, began = amount(150, 2000), originals(), time.monotonic()
    refused, most, faults = 0, 0, []

    def read(seeds: range) -> Callable[[], None]:
        def child() -> None:
            for seed in seeds:
                print(f"{seed} ...", flush=True)
                what, content = mutated(seed, pictures)
                first = decoded(content, tmp_path / "image")
                assert first == decoded(content, tmp_path / "image"), f"{what}: differs the second time"
                assert first != "refused: ", what
                print(f"{seed} {'refused' if first.startswith('refused') else 'read'}")
            print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} kB")

        return child

    for first in range(0, files, CHILD_FILES):
        end = forked(read(range(first, min(first + CHILD_FILES, files))), seconds=SECONDS, memory_bytes=MEMORY_BYTES)
        if end.code != 0:
            last = [line for line in end.output.splitlines() if line.endswith(" ...")][-1]
            faults.append(f"seed {last.split()[0]}: signal {end.signal}, {end.output.splitlines()[-1]}")
        else:
            most = max(most, int(end.output.split()[-2]))
        refused += end.output.count(" refused\n")
    record(
        "damaged images decoded", made=files, failures=len(faults), seconds=time.monotonic() - began,
        goal="2,000 files: no signal, no hang, memory bounded, decoded alike or refused with a reason",
        note=f"{refused} refused, at most {most / 2**10:,.0f} MiB resident",
    )  # fmt: skip
    assert faults == []
    assert 0.2 * files < refused < 0.95 * files


def stored(data: Path) -> dict[str, bytes]:
    return {str(path.relative_to(data)): path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file()}


def test_a_folder_of_damaged_images_is_prepared_alike_and_names_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--on-bad skip` without its limit, which is for folders that are mostly whole."""
    monkeypatch.setattr(prepare, "BAD_LIMIT", 1.0)
    files, pictures, began = amount(150, 2000), originals(), time.monotonic()
    raw = write_image_folder(tmp_path / "raw", per_class=2, test_per_class=2)
    folder = raw / "unlabeled"
    folder.mkdir()
    made = {}
    for seed in range(files):
        what, content = mutated(seed, pictures)
        made[f"unlabeled/{seed:05d}"] = what
        (folder / f"{seed:05d}").write_bytes(content)
    flags = ["prepare", "folder", "--raw", str(raw), "--resolution", str(RESOLUTION), "--scale16", "--first-frame"]

    def child(name: str) -> Callable[[], int]:
        return lambda: main([*flags, "--on-bad", "skip", "--out", str(tmp_path / name / "data")])

    limits = {"seconds": 2 * SECONDS * (1 + files / CHILD_FILES), "memory_bytes": 2 * MEMORY_BYTES}
    ends = [forked(child(name), **limits) for name in ("first", "second")]  # type: ignore[arg-type]
    assert [end.code for end in ends] == [0, 0], ends
    first, second = (stored(tmp_path / name / "data") for name in ("first", "second"))
    manifest = load_manifest(tmp_path / "first" / "data")
    verify_manifest(manifest)
    with (tmp_path / "first" / "data" / "bad.csv").open(newline="", encoding="utf-8") as table:
        bad = {row["file"]: row["reason"] for row in csv.DictReader(table)}
    odd = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    unnamed = [f"{name} ({made.get(name)})" for name, reason in bad.items() if name not in made or not reason]
    failures = [] if manifest.length("unlabeled") + len(bad) == files else ["a file is neither stored nor named"]
    record(
        "damaged images prepared", made=files, failures=len(odd) + len(unnamed) + len(failures),
        goal="2,000 files: each stored the same by a second run or named in bad.csv",
        seconds=time.monotonic() - began, note=f"{len(bad)} left out",
    )  # fmt: skip
    assert (odd, unnamed, failures) == ([], [], [])
    for seed, name in enumerate(sorted(made)):  # and what is stored is what the decoding function makes of the file
        if name not in bad:
            row = sorted(set(made) - set(bad)).index(name)
            alone = decoded((raw / name).read_bytes(), tmp_path / "image")
            assert hashlib.sha256(manifest.images("unlabeled")[row].tobytes()).hexdigest() == alone, f"seed {seed}"


def test_refused_files_fail_a_preparation_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = originals()
    raw = write_image_folder(tmp_path / "raw", per_class=2, test_per_class=2)
    (raw / "unlabeled").mkdir()
    for seed in range(20):
        (raw / "unlabeled" / f"{seed:05d}").write_bytes(mutated(seed, pictures)[1])
    assert main(["prepare", "folder", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 2
    message = capsys.readouterr().err
    assert "files are no usable images, repair or remove them (or --on-bad skip)" in message
    assert message.count("unlabeled/") == int(message.split(" files are")[0].split()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
