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

from semi_fast.ops import door

CUTOUT_FILL = 127
CACHED_PIXELS = 2**16
"""Of the images that a CPU makes at once: what is computed of them, 16 bytes a pixel, stays in its second cache."""


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


def entries(images: Tensor) -> Tensor:
    """Which entry of a table [n, 3, 256] each value is, the table laid flat: int32 [n * H * W * 3]."""
    n, h, w, _ = images.shape
    first = torch.arange(0, n * 768, 256, dtype=torch.int32, device=images.device)
    return images.reshape(n, h, w * 3).int().add_(first.view(n, 1, 3).repeat(1, 1, w)).flatten()


def histogram(values: Tensor, images: int) -> Tensor:
    """Counts per image, channel and value, from `entries`: int64 [n, 3, 256]."""
    counts = torch.zeros(images * 768, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.long(), counts.new_ones(1).expand(len(values))).view(images, 3, 256)


def ramp(images: Tensor) -> Tensor:
    """The values 0..255, int64 [1, 1, 256]."""
    return torch.arange(256, device=images.device).view(1, 1, 256)


def enhance(level: Tensor) -> Tensor:
    """Enhancement factor 0.09 * level + 0.05, made in float64 and used in float32 as Pillow does: [n]."""
    return (level.double() * 0.9 / 10 + 0.05).float()


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (images - degenerate) in float32, truncated; the factor lies in (0, 1)."""
    base = degenerate.float()
    return images.float().sub_(base).mul_(factor).add_(base).to(torch.uint8)


def auto_contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    at, values = entries(images), ramp(images).double()
    seen = histogram(at, len(images)) > 0
    low = seen.int().argmax(2, keepdim=True).double()
    high = 255 - seen.flip(2).int().argmax(2, keepdim=True).double()
    scale = torch.div(torch.full_like(low, 255.0), (high - low).clamp_min(1.0))  # a true division, not a reciprocal
    table = (values * scale - low * scale).trunc().clamp(0, 255)
    table = torch.where(high > low, table, values).to(torch.uint8)
    return table.flatten().index_select(0, at).view(images.shape)


def brightness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return blend(torch.zeros_like(level).view(-1, 1, 1, 1), images, enhance(level).view(-1, 1, 1, 1))


def color(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return blend(luma(images).unsqueeze(-1).expand(images.shape).contiguous(), images, enhance(level).view(-1, 1, 1, 1))


def contrast(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    grey = luma(images).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])  # int64, rounded half up, [n]
    return blend(mean.view(-1, 1, 1, 1), images, enhance(level).view(-1, 1, 1, 1))


def equalize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    at = entries(images)
    counts = histogram(at, len(images))
    pixels = images.shape[1] * images.shape[2]
    highest = 255 - (counts > 0).flip(2).int().argmax(2, keepdim=True)
    step = (pixels - counts.gather(2, highest)) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step == 0, ramp(images), table).to(torch.uint8)
    return table.flatten().index_select(0, at).view(images.shape)


def identity(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return images


def posterize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    bits = 4 + level * 4 // 10
    return images & (0xFF00 >> bits).bitwise_and(0xFF).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    highest = (255 - level * 256 // 10).to(torch.uint8).view(-1, 1, 1, 1)
    return images ^ (images > highest).byte() * 255  # all bits turned: 255 minus the value


def sharpness(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    x = images.short()
    column = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    around = column[:, :, :-2] + column[:, :, 1:-1] + column[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    smooth = images.float()  # Pillow leaves the border as it is
    # the 13-part kernel, rounded to nearest; never a whole number before it is cut, so no rounding of / matters
    smooth[:, 1:-1, 1:-1] = ((2 * around + 13).float() / 26).trunc()
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
    """The coefficients of every level and sign: int32 [10, 2, 6], sign +1 first."""
    rows = [[affine_coefficients(name, v, s, height, width) for s in (1, -1)] for v in range(10)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def affine(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The geometric operation of that name: nearest neighbour, black outside."""

    def transform(images: Tensor, level: Tensor, sign: Tensor) -> Tensor:
        n, h, w, _ = images.shape
        table = affine_table(name, h, w, images.device)
        a, b, c, d, e, f = table[level, (sign < 0).long()].view(n, 6, 1, 1).unbind(1)
        x = torch.arange(w, dtype=torch.int32, device=images.device).view(1, 1, w)
        y = torch.arange(h, dtype=torch.int32, device=images.device).view(1, h, 1)
        from_x, from_y = (c + a * x + b * y) >> 16, (f + d * x + e * y) >> 16  # [n, H, W]
        kept_x, kept_y = from_x.clamp(0, w - 1), from_y.clamp(0, h - 1)
        inside = (from_x == kept_x) & (from_y == kept_y)
        picked = take_pixels(images, torch.arange(n, device=images.device), kept_y, kept_x)
        return picked * inside.unsqueeze(-1)

    return transform


def take_pixels(images: Tensor, sources: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Pixels of the images `sources` [N], of each at its own positions [N, H or 1, W or 1]."""
    h, w = images.shape[1:3]
    views, n = images.new_empty(len(sources), h, w, 3), images_at_once(images)
    whole = torch.int32 if images.numel() < 2**31 else torch.int64
    rows = (sources.view(-1, 1, 1) * (h * w) + y * w).to(whole)
    for made, row, column in zip(views.split(n), rows.split(n), x.to(whole).split(n), strict=True):
        torch.index_select(images.reshape(-1, 3), 0, (row + column).flatten(), out=made.view(-1, 3))
    return views


def images_at_once(images: Tensor) -> int:
    """On a CPU so few images of this size that what is made of them stays in its cache; elsewhere all."""
    pixels = images.shape[1] * images.shape[2]
    return max(1, CACHED_PIXELS // pixels) if images.device.type == "cpu" else 2**31


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
    if door.values_at_hand(images.device):
        order = operation.argsort()
        rows = operation.bincount(minlength=len(OPERATIONS)).tolist()
        groups = zip(*(x.index_select(0, order).split(rows) for x in (images, level, sign)), strict=True)
        made = [f(*group) if len(group[0]) else group[0] for f, group in zip(OPERATIONS.values(), groups, strict=True)]
        return torch.cat(made).index_select(0, order.argsort())
    result = images
    for index, transform in enumerate(OPERATIONS.values()):
        if index != IDENTITY:
            chosen = (operation == index).view(-1, 1, 1, 1)
            result = torch.where(chosen, transform(images, level, sign), result)
    return result


def flip_and_crop(
    images: Tensor, sources: Tensor, flip: Tensor, crop: Tensor, pad: int, zero_padded: int = 0
) -> Tensor:
    """Images `sources`, mirrored where `flip`, padded by reflection without repeating the edge, cut H x W at `crop`.

    The first `zero_padded` rows are padded by black instead.
    """
    h, w = images.shape[1:3]
    y = torch.arange(h, device=images.device) + crop[:, :1] - pad  # [n, H]
    x = torch.arange(w, device=images.device) + crop[:, 1:] - pad  # [n, W]
    out_y, out_x = ((at[:zero_padded] < 0) | (at[:zero_padded] >= side) for at, side in ((y, h), (x, w)))
    y, x = ((side - 1) - (side - 1 - at.abs()).abs() for at, side in ((y, h), (x, w)))
    x = torch.where(flip.bool().unsqueeze(1), w - 1 - x, x)
    views = take_pixels(images, sources, y.unsqueeze(2), x.unsqueeze(1))
    views[:zero_padded].masked_fill_((out_y.unsqueeze(2) | out_x.unsqueeze(1)).unsqueeze(-1), 0)
    return views


def cut_out(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """Fill the box from `corner` [n, 2] with grey, both corners inclusive: up to size + 1 pixels a side."""
    h, w = images.shape[1:3]
    y = torch.arange(h, device=images.device) - corner[:, :1]  # [n, H]
    x = torch.arange(w, device=images.device) - corner[:, 1:]  # [n, W]
    rows, columns = (((at >= 0) & (at <= size)).byte() * 255 for at in (y, x))  # all bits of a value, or none
    rows, columns = rows.unsqueeze(2), columns.repeat_interleave(3, 1).unsqueeze(1)  # [n, H, 1], [n, 1, W * 3]
    kept = images.reshape(*rows.shape[:2], -1) & (~rows | ~columns)
    return kept.bitwise_or_(rows & (columns & CUTOUT_FILL)).view(images.shape)


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
    views = flip_and_crop(images, sources, parameters.flip, parameters.crop, pad, zero_padded)
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
    most = torch.full_like(mean, 255)  # by a plain number CUDA multiplies with its reciprocal
    result, some = torch.empty(n, h, w * 3, dtype=dtype, device=images.device), images_at_once(images)
    for made, rows in zip(result.split(some), images.reshape(n, h, w * 3).split(some), strict=True):
        torch.div(rows.to(exact).div_(most).sub_(mean), std, out=made)
    return result.view(n, h, w, 3).permute(0, 3, 1, 2)
