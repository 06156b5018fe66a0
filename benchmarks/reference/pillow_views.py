"""The views one image at a time through Pillow and torchvision, as the released code's loader workers make them.

Written from section 4.4 of the description. The parameters of a view are drawn first and applied then, so that the same
ones can be given to the batched operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import functional

GREY = (127, 127, 127)


@dataclass(frozen=True)
class View:
    """What happens to one image."""

    flip: bool
    crop: tuple[int, int]  # (y, x) in the padded image
    operations: tuple[tuple[str, int, int], ...] = ()  # (name, level 1..9, sign), of those that do happen
    cutout: tuple[int, int] | None = None  # (y, x) of the box's first corner


def _factor(level: int) -> float:
    return 0.09 * level + 0.05


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


TRANSFORMS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "auto_contrast": lambda image, v, s: ImageOps.autocontrast(image),
    "brightness": lambda image, v, s: ImageEnhance.Brightness(image).enhance(_factor(v)),
    "color": lambda image, v, s: ImageEnhance.Color(image).enhance(_factor(v)),
    "contrast": lambda image, v, s: ImageEnhance.Contrast(image).enhance(_factor(v)),
    "equalize": lambda image, v, s: ImageOps.equalize(image),
    "identity": lambda image, v, s: image,
    "posterize": lambda image, v, s: ImageOps.posterize(image, 4 + v * 4 // 10),
    "rotate": lambda image, v, s: image.rotate(s * 3 * v),
    "sharpness": lambda image, v, s: ImageEnhance.Sharpness(image).enhance(_factor(v)),
    "shear_x": lambda image, v, s: _affine(image, 1, s * 0.03 * v, 0, 0, 1, 0),
    "shear_y": lambda image, v, s: _affine(image, 1, 0, 0, s * 0.03 * v, 1, 0),
    "solarize": lambda image, v, s: ImageOps.solarize(image, 256 - v * 256 // 10),
    "translate_x": lambda image, v, s: _affine(image, 1, 0, int(s * 0.03 * v * image.width), 0, 1, 0),
    "translate_y": lambda image, v, s: _affine(image, 1, 0, 0, 0, 1, int(s * 0.03 * v * image.height)),
}
NAMES = tuple(TRANSFORMS)


def draw_weak(random: Random, pad: int, *, flip: bool = True) -> View:
    """A mirror image or not, where images may be mirrored, and where to cut."""
    return View(flip and random.random() < 0.5, (random.randint(0, 2 * pad), random.randint(0, 2 * pad)))


def draw_strong(random: Random, side: int, pad: int, cutout: int, *, flip: bool = True) -> View:
    """The same, two operations of which each happens with probability 1/2, and a box."""
    weak = draw_weak(random, pad, flip=flip)
    chosen = [(random.choice(NAMES), random.randint(1, 9), random.choice((-1, 1))) for _ in range(2)]
    y, x = (int(max(0.0, random.uniform(0, side) - cutout / 2)) for _ in range(2))
    return View(weak.flip, weak.crop, tuple(o for o in chosen if random.random() < 0.5), (y, x))


def render(
    image: Image.Image,
    view: View,
    *,
    pad: int,
    cutout: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """The view, normalised: float32 [3, H, W]."""
    height, width = image.height, image.width
    x: Any = functional.hflip(image) if view.flip else image  # pyright: ignore[reportArgumentType]
    x = functional.crop(functional.pad(x, [pad], padding_mode="reflect"), *view.crop, height, width)
    for name, level, sign in view.operations:
        x = TRANSFORMS[name](x, level, sign)
    if view.cutout is not None and cutout:
        top, left = view.cutout
        x = x.copy()
        ImageDraw.Draw(x).rectangle((left, top, left + cutout, top + cutout), GREY)
    return functional.normalize(functional.to_tensor(x), list(mean), list(std), inplace=True)


def render_all(
    images: list[Image.Image],
    views: list[View],
    *,
    pad: int,
    cutout: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Image after image, collated: float32 [N, 3, H, W]."""
    rows = zip(images, views, strict=True)
    return torch.stack([render(image, view, pad=pad, cutout=cutout, mean=mean, std=std) for image, view in rows])
