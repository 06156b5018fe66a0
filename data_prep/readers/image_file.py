"""An image file: what it becomes, 8-bit RGB, upright and over black; or why it is refused."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

PIXEL_LIMIT = 64_000_000
FILE_LIMIT_BYTES = 2**29
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
    """skip: files that are no usable images are left out, up to 1 % of all, and listed in bad.csv."""
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


Fit = Callable[[Image.Image, int], Image.Image]
"""Makes an image of any size one of this many pixels a side."""


@dataclass(frozen=True)
class Recipe:
    """How a file becomes pixels."""

    fit: Fit
    resolution: int
    accepted: Accepted = REFUSED

    def __str__(self) -> str:
        return f"{self.fit.__name__} {self.resolution} {self.accepted}"


class ImageRead(NamedTuple):
    """What has become of a file."""

    sha256: bytes
    pixels: np.ndarray | str
    """Or why there are none."""
    mode: str
    """Pillow's name of how the file stores its pixels; all become RGB."""


def read_image(path: Path, recipe: Recipe) -> ImageRead:
    """What a file becomes, or why it is refused."""
    content = b""
    try:
        size = path.stat().st_size
        if size > FILE_LIMIT_BYTES:
            return ImageRead(b"", f"{size} bytes are more than {FILE_LIMIT_BYTES}", "")
        content = path.read_bytes()
        pixels = decode(content, recipe)
        with Image.open(io.BytesIO(content), formats=_formats()) as image:  # its header alone
            return ImageRead(hashlib.sha256(content).digest(), pixels, image.mode)
    except Image.UnidentifiedImageError:
        return ImageRead(b"", "not an image in a format that is read" if content else "empty file", "")
    except DECODE_ERRORS as error:
        return ImageRead(b"", str(error) or type(error).__name__, "")


def decode(content: bytes, recipe: Recipe) -> np.ndarray:
    """uint8 [resolution, resolution, 3] of one encoded image; ValueError says why it is refused."""
    return np.asarray(recipe.fit(open_rgb(content, recipe.accepted), recipe.resolution))


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
