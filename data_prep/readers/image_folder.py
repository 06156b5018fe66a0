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
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from semi_fast.data_prep.readers import Raw

PIXEL_LIMIT = 64_000_000
FILE_LIMIT_BYTES = 2**29
BLOCK_IMAGES = 256
SHOWN = 20
BAD_LIMIT = 0.01
DEEP_GREY = {"I;16", "I;16L", "I;16B"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# By content, never by name. Left out of Pillow's: formats that start another program (EPS, WMF) or have no signature.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TIFF", "WEBP")
# What Pillow's decoders are known to raise on damaged files; the file is named and refused, whatever it was.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError,
                 MemoryError, RuntimeError, AssertionError, struct.error, zlib.error,
                 Image.DecompressionBombError)  # fmt: skip


@dataclass(frozen=True)
class Accepted:
    """What is accepted of images that is refused without these flags."""

    on_bad: str = "fail"
    """skip: files that are no usable images are left out, up to `BAD_LIMIT` of all, and listed in bad.csv."""
    scale16: bool = False
    """Of pixels with 16 bits a channel the upper 8 are taken."""
    first_frame: bool = False
    """Of an animation the first frame is taken."""
    follow: bool = False
    """Links may lead out of the folder."""

    @property
    def arguments(self) -> str:
        """As flags of the command."""
        switches = [("scale16", self.scale16), ("first-frame", self.first_frame), ("follow", self.follow)]
        skip = "" if self.on_bad == "fail" else f" --on-bad {self.on_bad}"
        return skip + "".join(f" --{name}" for name, on in switches if on)


REFUSED = Accepted()


class BadImagesError(ValueError):
    """Files that are no usable images, each with the reason, of so many files."""

    def __init__(self, bad: dict[Path, str], files: int):
        lines = [f"{str(path)!r}: {reason}" for path, reason in list(bad.items())[:SHOWN]]
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        way_out = "repair or remove them (or --on-bad skip)"
        super().__init__(f"{len(bad)} files are no usable images, {way_out}: {'; '.join(lines)}{more}")
        self.bad, self.files = bad, files


class Listing:
    """The files under a folder, sorted, without hidden ones, which are counted, and without those left out."""

    def __init__(self, raw: Path, *, follow: bool = False, left_out: Collection[Path] = ()) -> None:
        self.raw, self.follow, self.left_out = raw, follow, frozenset(left_out)
        self.hidden = 0

    def visible(self, folder: Path) -> list[Path]:
        """What is in `folder`; links must lead to something, inside `raw` unless they are followed."""
        everything = sorted(folder.iterdir())
        paths = [path for path in everything if not path.name.startswith(".")]
        self.hidden += len(everything) - len(paths)
        outside = [p for p in paths if p.is_symlink() and not self._leads_inside(p)]
        if outside:
            rule = "links must lead to files" if self.follow else f"links must lead to files inside {self.raw}"
            raise ValueError(f"{rule}; these do not: {listed(outside)}")
        return [path for path in paths if path not in self.left_out]

    def _leads_inside(self, path: Path) -> bool:
        try:
            return path.resolve(strict=True).is_relative_to(self.raw.resolve()) or self.follow
        except (OSError, RuntimeError):  # broken, or a circle
            return False


def read_image_folder(raw: Path, resolution: int, accepted: Accepted = REFUSED, left_out: Collection[Path] = ()) -> Raw:
    """Classes and files sorted by name, hidden ones ignored. Names are checked here, pixels as `blocks` are read."""
    listing, test = Listing(raw, follow=accepted.follow, left_out=left_out), _test_folder(raw)
    classes = {part: _class_files(listing, folder) for part, folder in (("train", raw / "train"), ("test", test))}
    names = tuple(classes["train"])
    if differing := sorted(set(names) ^ set(classes["test"])):
        raise ValueError(f"train/ and {test.name}/ must hold the same classes; they differ in {listed(differing)}")
    files = {part: [path for k in names for path in of_class[k]] for part, of_class in classes.items()}
    labels = {p: np.repeat(np.arange(len(names)), [len(c[k]) for k in names]) for p, c in classes.items()}
    files["unlabeled"] = _unlabeled_files(listing)
    source: dict[str, Any] = {
        "reader": "folder",
        "name": Path(os.path.abspath(raw)).name,
        "files": sum(map(len, files.values())),
        "hidden_files_ignored": listing.hidden,
    }
    return Raw(
        dataset="folder",
        class_names=names,
        resolution=(resolution, resolution),
        labels=labels,
        num_unlabeled=len(files["unlabeled"]),
        blocks=_blocks(raw, files, resolution, source, accepted),
        source=source,
    )


def decode(content: bytes, resolution: int, accepted: Accepted = REFUSED) -> np.ndarray:
    """uint8 [resolution, resolution, 3] of one encoded image; ValueError says why it is refused."""
    rgb = open_rgb(content, accepted)
    width, height = rgb.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    size, box = (resolution, resolution), (left, top, left + side, top + side)
    return np.asarray(rgb.resize(size, Image.Resampling.BICUBIC, box=box))


def open_rgb(content: bytes, accepted: Accepted = REFUSED) -> Image.Image:
    """The whole image, upright, as 8-bit RGB over black; ValueError says why it is refused."""
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        width, height = image.size
        if width * height > PIXEL_LIMIT:
            raise ValueError(f"{width}x{height} is more than {PIXEL_LIMIT // 1_000_000} megapixels")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO" and not accepted.first_frame:  # MPO: a photograph and its previews
            raise ValueError(f"animated or with {frames} pages; --first-frame takes the first")
        deep_grey = image.mode in DEEP_GREY
        if (image.mode not in MODES and not deep_grey) or ((deep_grey or _is_deep(image)) and not accepted.scale16):
            raise ValueError(f"pixels of mode {image.mode} with more than 8 bits; --scale16 takes 8 of 16")
        image.load()
        upright = ImageOps.exif_transpose(image)
        if deep_grey:
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))  # as Pillow does with colours
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
    raw: Path, files: dict[str, list[Path]], resolution: int, source: dict[str, Any], accepted: Accepted
) -> Iterator[tuple[str, np.ndarray]]:
    """Decodes on every core; ValueError at the end names what failed. Puts the digest of all files into `source`."""
    digest, bad = hashlib.sha256(), {}
    decoder = partial(decode, accepted=accepted)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part, paths in files.items():
            for first in range(0, len(paths), BLOCK_IMAGES):
                chunk = paths[first : first + BLOCK_IMAGES]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns of what is refused here, or of harmless metadata
                    decoded = list(pool.map(lambda path: read_image(path, resolution, decoder), chunk))
                for path, (sha256, pixels) in zip(chunk, decoded, strict=True):
                    digest.update(os.fsencode(path.relative_to(raw)) + b"\0" + sha256)
                    if isinstance(pixels, str):
                        bad[path] = pixels
                if not bad:
                    yield part, np.stack([pixels for _, pixels in decoded])  # type: ignore[arg-type]
    if bad:
        raise BadImagesError(bad, source["files"])
    source["sha256"] = digest.hexdigest()


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


def _class_files(listing: Listing, part: Path) -> dict[str, list[Path]]:
    """Class name -> its files, both sorted by name."""
    folders = listing.visible(part)
    stray = [path for path in folders if not path.is_dir()]
    if stray:
        raise ValueError(f"{part} must hold one folder per class; {listed(stray)} are files")
    seen: dict[str, str] = {}
    for folder in folders:
        other = seen.setdefault(unicodedata.normalize("NFC", folder.name).casefold(), folder.name)
        if other != folder.name:
            raise ValueError(f"{part}: class names must differ in more than case; {listed([other, folder.name])}")
    files = {folder.name: listing.visible(folder) for folder in folders}
    for name, paths in files.items():
        if not paths:
            raise ValueError(f"{part / name}: class {name!r} has no image; add some or remove the class everywhere")
        check_regular(paths)
    return files


def _unlabeled_files(listing: Listing) -> list[Path]:
    """Files under `unlabeled/` at any depth, folder by folder in the order of their names."""
    root = listing.raw / "unlabeled"
    if not root.is_dir():
        return []

    def walk(folder: Path) -> Iterator[Path]:
        for path in listing.visible(folder):
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path

    paths = list(walk(root))
    if not paths:
        raise ValueError(f"{root} holds no image; add some or remove it")
    check_regular(paths)
    return paths


def check_regular(paths: list[Path]) -> None:
    odd = [path for path in paths if not stat.S_ISREG(path.stat().st_mode)]
    if odd:
        raise ValueError(f"images must be regular files; {len(odd)} are folders or devices: {listed(odd)}")


def listed(items: list[Any]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(repr(str(item)) for item in items[:SHOWN]) + more
