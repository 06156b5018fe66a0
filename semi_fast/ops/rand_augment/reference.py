"""Reference of the views: batched torch arithmetic that equals Pillow bit for bit, each image with its own operations.

Images are uint8 [n, H, W, 3]; `level` is int64 [n] in 1..9 and `sign` int64 [n] in {-1, +1}.
Source of operations, magnitudes and order: `RandAugment` of the FixMatch lineage, as used by SeMi.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

CUTOUT_FILL = 127


class ViewParameters(NamedTuple):
    """What happens to each of N views; every field is int64 on the images' device."""

    flip: Tensor  # [N], 1 to mirror left and right
    crop: Tensor  # [N, 2], (y, x) corner in the padded image, 0..2 * pad
    operation: Tensor  # [R, 2], indices into OPERATIONS, for the last R views (the strong ones)
    level: Tensor  # [R, 2], 1..9
    sign: Tensor  # [R, 2], -1 or +1
    cutout: Tensor  # [R, 2], (y, x) corner of the box, already clamped to >= 0


def luma(images: Tensor) -> Tensor:
    """Pillow's conversion to grey, int32 [n, H, W]."""
    x = images.int()
    return (x[..., 0] * 19595 + x[..., 1] * 38470 + x[..., 2] * 7471 + 0x8000) >> 16


def histogram(images: Tensor) -> Tensor:
    """Counts per image, channel and value: int64 [n, 3, 256]."""
    n = images.shape[0]
    flat = images.reshape(n, -1, 3).transpose(1, 2).long()
    counts = torch.zeros(n, 3, 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, flat, torch.ones_like(flat))


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace every value through its image's and channel's table, uint8 [n, 3 or 1, 256]."""
    n, h, w, _ = images.shape
    flat = images.reshape(n, h * w, 3).transpose(1, 2).long()
    return table.expand(n, 3, 256).gather(2, flat).transpose(1, 2).reshape(n, h, w, 3)


def ramp(images: Tensor) -> Tensor:
    """The values 0..255, int64 [1, 1, 256]."""
    return torch.arange(256, device=images.device).view(1, 1, 256)


def enhance(level: Tensor) -> Tensor:
    """Enhancement factor 0.09 * level + 0.05, made in float64 and used in float32 as Pillow does: [n]."""
    return (level.double() * 0.9 / 10 + 0.05).float()


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (images - degenerate) in float32, truncated; the factor lies in (0, 1)."""
    base = degenerate.float()
    return (base + factor * (images.float() - base)).to(torch.uint8)


def auto_contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    values = ramp(images).double()
    seen = histogram(images) > 0
    low = seen.int().argmax(2, keepdim=True).double()
    high = 255 - seen.flip(2).int().argmax(2, keepdim=True).double()
    scale = torch.div(torch.full_like(low, 255.0), (high - low).clamp_min(1.0))  # a true division, not a reciprocal
    table = (values * scale - low * scale).trunc().clamp(0, 255)
    return look_up(images, torch.where(high > low, table, values).to(torch.uint8))


def brightness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    values = ramp(images)
    return look_up(images, blend(torch.zeros_like(values), values, enhance(level).view(-1, 1, 1)))


def color(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return blend(luma(images).unsqueeze(-1), images, enhance(level).view(-1, 1, 1, 1))


def contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    grey = luma(images).flatten(1).long()
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])  # rounded half up, [n]
    return look_up(images, blend(mean.view(-1, 1, 1), ramp(images), enhance(level).view(-1, 1, 1)))


def equalize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    counts = histogram(images)
    pixels = images.shape[1] * images.shape[2]
    highest = 255 - (counts > 0).flip(2).int().argmax(2, keepdim=True)
    step = (pixels - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    return look_up(images, torch.where(step == 0, ramp(images), table).to(torch.uint8))


def identity(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return images


def posterize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    bits = 4 + level * 4 // 10
    return images & (0xFF00 >> bits).bitwise_and(0xFF).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    threshold = (256 - level * 256 // 10).view(-1, 1, 1, 1)
    return torch.where(images.long() < threshold, images, 255 - images)


def sharpness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    x = images.int()
    h, w = x.shape[1:3]
    around = sum(x[:, i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3)) + 4 * x[:, 1:-1, 1:-1]
    smooth = x.clone()  # Pillow leaves the border as it is
    smooth[:, 1:-1, 1:-1] = (2 * around + 13) // 26  # the 13-part kernel, rounded to nearest
    return blend(smooth, images, enhance(level).view(-1, 1, 1, 1))


def affine_coefficients(name: str, level: int, sign: int, height: int, width: int) -> list[int]:
    """Pillow's output-to-input map in 16.16 fixed point, moved to pixel centres: six integers."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    fraction = float(level) * 0.3 / 10
    if name == "rotate":
        angle = -math.radians((sign * int(level * 30 / 10)) % 360.0)
        a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
        d, e = round(-math.sin(angle), 15), round(math.cos(angle), 15)
        c = a * -(width / 2.0) + b * -(height / 2.0) + width / 2.0
        f = d * -(width / 2.0) + e * -(height / 2.0) + height / 2.0
    elif name == "shear_x":
        b = sign * fraction
    elif name == "shear_y":
        d = sign * fraction
    elif name == "translate_x":
        c = float(int(sign * fraction * width))
    elif name == "translate_y":
        f = float(int(sign * fraction * height))
    exact = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return [math.floor(v * 65536.0 + 0.5) for v in exact]


@cache
def affine_table(name: str, height: int, width: int, device: torch.device) -> Tensor:
    """The coefficients of every level and sign: int64 [10, 2, 6], sign +1 first."""
    rows = [[affine_coefficients(name, v, s, height, width) for s in (1, -1)] for v in range(10)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def affine(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The geometric operation of that name: nearest neighbour, black outside."""

    def transform(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        n, h, w, _ = images.shape
        table = affine_table(name, h, w, images.device)
        a, b, c, d, e, f = table[level, (sign < 0).long()].view(n, 6, 1, 1).unbind(1)
        x = torch.arange(w, device=images.device).view(1, 1, w)
        y = torch.arange(h, device=images.device).view(1, h, 1)
        from_x, from_y = (c + a * x + b * y) >> 16, (f + d * x + e * y) >> 16  # [n, H, W]
        inside = (from_x >= 0) & (from_x < w) & (from_y >= 0) & (from_y < h)
        picked = take_pixels(images, from_y.clamp(0, h - 1), from_x.clamp(0, w - 1))
        return picked * inside.unsqueeze(-1)

    return transform


def take_pixels(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The pixels of each image at its own integer positions [n, H, W] (or broadcastable to that)."""
    n, h, w, _ = images.shape
    first = torch.arange(n, device=images.device).view(n, 1, 1) * (h * w)
    return images.reshape(n * h * w, 3)[(first + y * w + x).reshape(-1)].view(n, h, w, 3)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto_contrast": auto_contrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalize,
    "identity": identity,
    "posterize": posterize,
    "rotate": affine("rotate"),
    "sharpness": sharpness,
    "shear_x": affine("shear_x"),
    "shear_y": affine("shear_y"),
    "solarize": solarize,
    "translate_x": affine("translate_x"),
    "translate_y": affine("translate_y"),
}
IDENTITY = list(OPERATIONS).index("identity")


def apply_operations(images: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Give each image its own operation; `operation`, `level`, `sign` are [n].

    On a CPU only the rows that need an operation go through it; elsewhere every row goes through every operation and
    a selection follows, which costs more arithmetic but has a fixed shape and does not wait for the device.
    """
    result = images.clone()
    for index, transform in enumerate(OPERATIONS.values()):
        if index == IDENTITY:
            continue
        if images.device.type == "cpu":
            rows = (operation == index).nonzero().squeeze(1)  # a CPU tensor: there is no device to wait for
            if len(rows):
                result[rows] = transform(images[rows], level[rows], sign[rows])
        else:
            chosen = (operation == index).view(-1, 1, 1, 1)
            result = torch.where(chosen, transform(images, level, sign), result)
    return result


def flip_and_crop(images: Tensor, flip: Tensor, crop: Tensor, pad: int, zero_padded: int = 0) -> Tensor:
    """Mirror where `flip`, pad by reflection without repeating the edge, cut H x W at `crop`.

    The first `zero_padded` rows are padded by black instead.
    """
    h, w = images.shape[1:3]
    y = torch.arange(h, device=images.device) + crop[:, :1] - pad  # [n, H]
    x = torch.arange(w, device=images.device) + crop[:, 1:] - pad  # [n, W]
    outside = ((y < 0) | (y >= h)).unsqueeze(2) | ((x < 0) | (x >= w)).unsqueeze(1)  # [n, H, W]
    y, x = ((side - 1) - (side - 1 - at.abs()).abs() for at, side in ((y, h), (x, w)))
    x = torch.where(flip.bool().unsqueeze(1), w - 1 - x, x)
    views = take_pixels(images, y.unsqueeze(2), x.unsqueeze(1))
    views[:zero_padded].masked_fill_(outside[:zero_padded].unsqueeze(-1), 0)
    return views


def cut_out(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """Fill the box from `corner` [n, 2] with grey, both corners inclusive: up to size + 1 pixels a side."""
    h, w = images.shape[1:3]
    y = torch.arange(h, device=images.device) - corner[:, :1]  # [n, H]
    x = torch.arange(w, device=images.device) - corner[:, 1:]  # [n, W]
    box = ((y >= 0) & (y <= size)).unsqueeze(2) & ((x >= 0) & (x <= size)).unsqueeze(1)
    return images.masked_fill(box.unsqueeze(-1), CUTOUT_FILL)


def rand_augment(
    images: Tensor,
    sources: Tensor,
    parameters: ViewParameters,
    *,
    pad: int,
    cutout: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    zero_padded: int = 0,
) -> Tensor:
    """See `semi_fast.ops.rand_augment.rand_augment`."""
    views = flip_and_crop(images[sources], parameters.flip, parameters.crop, pad, zero_padded)
    strong = len(parameters.operation)
    if strong:
        x = views[-strong:]
        for turn in range(parameters.operation.shape[1]):
            x = apply_operations(x, parameters.operation[:, turn], parameters.level[:, turn], parameters.sign[:, turn])
        views[-strong:] = cut_out(x, parameters.cutout, cutout) if cutout else x
    return normalise(views, mean, std, dtype)


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std in float32 (float64 if asked for): [n, 3, H, W], stored NHWC."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    n, h, w, _ = images.shape
    mean, std = (x.to(exact).repeat(w) for x in (mean, std))  # [W * 3]: whole rows at once, which a CPU vectorises
    scaled = images.reshape(n, h, w * 3).to(exact)
    scaled.div_(torch.full_like(mean, 255))  # by a plain number CUDA multiplies with its reciprocal
    return scaled.sub_(mean).div_(std).to(dtype).view(n, h, w, 3).permute(0, 3, 1, 2)
