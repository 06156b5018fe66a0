"""An image folder: `train/<class>/*`, `test/<class>/*` or `val/<class>/*`, and optionally `unlabeled/**`.

Every image becomes uint8 RGB of resolution x resolution: EXIF orientation applied, transparency over black, the short
side resized to the resolution with Pillow's antialiased bicubic filter, the centre kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from semi_fast.data_prep.readers import Raw

PIXEL_LIMIT = 64_000_000
FILE_LIMIT_BYTES = 2**29
BLOCK_IMAGES = 256
SHOWN = 20
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# By content, never by name. Left out of Pillow's: formats that start another program (EPS, WMF) or have no signature.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TIFF", "WEBP")
# What Pillow's decoders are known to raise on damaged files; the file is named and refused, whatever it was.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
                 MemoryError, RuntimeError, AssertionError, struct.error, zlib.error,
                 Image.DecompressionBombError)  # fmt: skip


def read_image_folder(raw: Path, resolution: int) -> Raw:
    """Classes and files sorted by name, hidden ones ignored. Names are checked here, pixels as `blocks` are read."""
    test = _test_folder(raw)
    classes = {part: _class_files(raw, folder) for part, folder in (("train", raw / "train"), ("test", test))}
    names = tuple(classes["train"])
    if differing := sorted(set(names) ^ set(classes["test"])):
        raise ValueError(f"train/ and {test.name}/ must hold the same classes; they differ in {listed(differing)}")
    files = {part: [path for k in names for path in of_class[k]] for part, of_class in classes.items()}
    labels = {p: np.repeat(np.arange(len(names)), [len(c[k]) for k in names]) for p, c in classes.items()}
    files["unlabeled"] = _unlabeled_files(raw)
    source: dict[str, Any] = {
        "reader": "folder",
        "name": Path(os.path.abspath(raw)).name,
        "files": sum(map(len, files.values())),
    }
    return Raw(
        dataset="folder",
        class_names=names,
        resolution=(resolution, resolution),
        labels=labels,
        num_unlabeled=len(files["unlabeled"]),
        blocks=_blocks(raw, files, resolution, source),
        source=source,
    )


def decode(content: bytes, resolution: int) -> np.ndarray:
    """uint8 [resolution, resolution, 3] of one encoded image; ValueError says why it is refused."""
    rgb = open_rgb(content)
    width, height = rgb.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    size, box = (resolution, resolution), (left, top, left + side, top + side)
    return np.asarray(rgb.resize(size, Image.Resampling.BICUBIC, box=box))


def open_rgb(content: bytes) -> Image.Image:
    """The whole image, upright, as 8-bit RGB over black; ValueError says why it is refused."""
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        width, height = image.size
        if width * height > PIXEL_LIMIT:
            raise ValueError(f"{width}x{height} is more than {PIXEL_LIMIT // 1_000_000} megapixels")
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photograph and its previews
            raise ValueError(f"animated or with {getattr(image, 'n_frames', 0)} pages")
        if image.mode not in MODES or _is_deep(image):
            raise ValueError(f"pixels of mode {image.mode} with more than 8 bits are not converted")
        image.load()
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.mode or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
        return upright.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether the file holds more than 8 bits a channel, which Pillow cuts off silently in RGB files."""
    for _, _, _, arguments in getattr(image, "tile", []):
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(";16" in value for value in values if isinstance(value, str)):
            return True
        if image.format == "PPM" and any(value > 255 for value in values if isinstance(value, int)):
            return True
    return False


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _blocks(
    raw: Path, files: dict[str, list[Path]], resolution: int, source: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Decodes on every core; ValueError at the end names what failed. Puts the digest of all files into `source`."""
    digest, bad = hashlib.sha256(), []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part, paths in files.items():
            for first in range(0, len(paths), BLOCK_IMAGES):
                chunk = paths[first : first + BLOCK_IMAGES]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns of what is refused here, or of harmless metadata
                    decoded = list(pool.map(lambda path: read_image(path, resolution, decode), chunk))
                for path, (sha256, pixels) in zip(chunk, decoded, strict=True):
                    digest.update(os.fsencode(path.relative_to(raw)) + b"\0" + sha256)
                    if isinstance(pixels, str):
                        bad.append(f"{str(path)!r}: {pixels}")
                if not bad:
                    yield part, np.stack([pixels for _, pixels in decoded])  # type: ignore[arg-type]
    check_usable(bad)
    source["sha256"] = digest.hexdigest()


def check_usable(bad: list[str]) -> None:
    """ValueError for files that are no images; `bad` has a line for each."""
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} files are no usable images, repair or remove them: {'; '.join(bad[:SHOWN])}{more}"
        )


def read_image(
    path: Path, resolution: int, decode: Callable[[bytes, int], np.ndarray]
) -> tuple[bytes, np.ndarray | str]:
    """SHA-256 of a file and what `decode` makes of it, or why it is refused."""
    content = b""
    try:
        size = path.stat().st_size
        if size > FILE_LIMIT_BYTES:
            return b"", f"{size} bytes are more than {FILE_LIMIT_BYTES}"
        content = path.read_bytes()
        return hashlib.sha256(content).digest(), decode(content, resolution)
    except Image.UnidentifiedImageError:
        return b"", "not an image in a format that is read" if content else "empty file"
    except DECODE_ERRORS as error:
        return b"", str(error) or type(error).__name__


def _test_folder(raw: Path) -> Path:
    if not (raw / "train").is_dir():
        raise ValueError(f"--raw must hold train/<class>/ folders; {raw} has no train/")
    found = [raw / name for name in ("test", "val") if (raw / name).is_dir()]
    if len(found) != 1:
        state = "has both" if found else "has neither"
        raise ValueError(f"--raw must hold either test/ or val/; {raw} {state}, keep the one to report on")
    return found[0]


def _class_files(raw: Path, part: Path) -> dict[str, list[Path]]:
    """Class name -> its files, both sorted by name."""
    folders = visible(raw, part)
    stray = [path for path in folders if not path.is_dir()]
    if stray:
        raise ValueError(f"{part} must hold one folder per class; {listed(stray)} are files")
    seen: dict[str, str] = {}
    for folder in folders:
        other = seen.setdefault(unicodedata.normalize("NFC", folder.name).casefold(), folder.name)
        if other != folder.name:
            raise ValueError(f"{part}: class names must differ in more than case; {listed([other, folder.name])}")
    files = {folder.name: visible(raw, folder) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise ValueError(f"{part / name}: class {name!r} has no image; add some or remove the class everywhere")
        check_regular(paths)
    return files


def _unlabeled_files(raw: Path) -> list[Path]:
    """Files under `unlabeled/` at any depth, folder by folder in the order of their names."""
    if not (raw / "unlabeled").is_dir():
        return []

    def walk(folder: Path) -> Iterator[Path]:
        for path in visible(raw, folder):
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path

    paths = list(walk(raw / "unlabeled"))
    if not paths:
        raise ValueError(f"{raw / 'unlabeled'} holds no image; add some or remove it")
    check_regular(paths)
    return paths


def visible(raw: Path, folder: Path) -> list[Path]:
    """What is in `folder`, sorted, without hidden entries; links must lead to something inside `raw`."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    outside = [p for p in paths if p.is_symlink() and not _leads_inside(p, raw)]
    if outside:
        raise ValueError(f"links must lead to files inside {raw}; these do not: {listed(outside)}")
    return paths


def _leads_inside(path: Path, raw: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(raw.resolve())
    except (OSError, RuntimeError):  # broken, or a circle
        return False


def check_regular(paths: list[Path]) -> None:
    odd = [path for path in paths if not stat.S_ISREG(path.stat().st_mode)]
    if odd:
        raise ValueError(f"images must be regular files; {len(odd)} are folders or devices: {listed(odd)}")


def listed(items: list[Any]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(repr(str(item)) for item in items[:SHOWN]) + more
