"""The views on a CPU, compiled by numba: one view after the other, whose pixels stay in the first caches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit  # pyright: ignore[reportMissingImports], optional
from torch import Tensor

from semi_fast.ops.rand_augment.reference import (
    CUTOUT_FILL,
    OPERATIONS,
    ViewParameters,
    affine_table,
    enhance,
    normalise,
)

INDEX = {name: index for index, name in enumerate(OPERATIONS)}
IDENTITY, COLOR, SHARPNESS = INDEX["identity"], INDEX["color"], INDEX["sharpness"]
AUTO_CONTRAST, EQUALIZE = INDEX["auto_contrast"], INDEX["equalize"]
BRIGHTNESS, CONTRAST = INDEX["brightness"], INDEX["contrast"]
POSTERIZE, SOLARIZE = INDEX["posterize"], INDEX["solarize"]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per value: results are moved, not computed, and numba has no bfloat16."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call, once for a machine where numba finds a folder to keep it in.

    Without fastmath: no multiplication is fused with an addition, which would round once less.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that can be written to
        return njit(nogil=True)(function)


@compiled
def read(image, top, left, flip, black, view):
    """Fill `view` from `image` [H, W, 3], mirrored, padded and cropped."""
    height, width = image.shape[:2]
    columns = np.empty(width, np.int64)
    for x in range(width):
        at = width - 1 - abs(width - 1 - abs(x + left))
        columns[x] = width - 1 - at if flip else at
    for y in range(height):
        row, into = image[height - 1 - abs(height - 1 - abs(y + top))], view[y]
        for x in range(width):
            at = columns[x]
            into[x, 0], into[x, 1], into[x, 2] = row[at, 0], row[at, 1], row[at, 2]
    if black:
        for y in range(height):
            for x in range(width):
                if not (0 <= y + top < height and 0 <= x + left < width):
                    view[y, x] = 0


@compiled
def luma(red, green, blue):
    return (np.int32(red) * 19595 + np.int32(green) * 38470 + np.int32(blue) * 7471 + 0x8000) >> 16


@compiled
def blend(degenerate, value, factor):
    base = np.float32(degenerate)
    return np.uint8(np.int32(base + factor * (np.float32(value) - base)))


@compiled
def count_table(view, channel, kind, table):
    """What auto_contrast or equalize makes of the values 0..255 of a channel."""
    height, width = view.shape[:2]
    counts = np.zeros(256, np.int64)
    for y in range(height):
        for x in range(width):
            counts[view[y, x, channel]] += 1
    low, high = 0, 255
    while counts[low] == 0:
        low += 1
    while counts[high] == 0:
        high -= 1
    step, below = (height * width - counts[high]) // 255, np.int64(0)
    scale = 255.0 / max(high - low, 1)
    for value in range(256):
        new = np.int64(value)
        if kind == AUTO_CONTRAST and high > low:
            new = np.int64(value * scale - low * scale)
        elif kind == EQUALIZE and step > 0:
            new = (step // 2 + below) // step
        table[value] = min(max(new, 0), 255)
        below += counts[value]


@compiled
def value_table(view, kind, level, factor, table):
    """What posterize, solarize, brightness or contrast makes of the values 0..255."""
    height, width = view.shape[:2]
    grey, pixels = np.int64(0), height * width
    if kind == CONTRAST:
        for y in range(height):
            for x in range(width):
                grey += luma(view[y, x, 0], view[y, x, 1], view[y, x, 2])
        grey = (2 * grey + pixels) // (2 * pixels)  # the mean, rounded half up
    for value in range(256):
        if kind == POSTERIZE:
            table[value] = value & ((0xFF00 >> (4 + level * 4 // 10)) & 0xFF)
        elif kind == SOLARIZE:
            table[value] = value if value < 256 - level * 256 // 10 else 255 - value
        else:
            table[value] = blend(grey, value, factor)


@compiled
def sharpen(view, factor, result):
    """The border stays as it is."""
    height, width = view.shape[:2]
    old, new = view.reshape(height, width * 3), result.reshape(height, width * 3)
    new[:] = old
    for y in range(1, height - 1):
        above, here, below, into = old[y - 1], old[y], old[y + 1], new[y]
        for at in range(3, width * 3 - 3):
            around = np.int32(4) * here[at]
            for row in (above, here, below):
                around += np.int32(row[at - 3]) + np.int32(row[at]) + np.int32(row[at + 3])
            into[at] = blend((2 * around + 13) // 26, here[at], factor)  # the 13-part kernel, rounded to nearest


@compiled
def move(view, affine, result):
    """Nearest neighbour through the map `affine` [6], black outside."""
    height, width = view.shape[:2]
    a, b, c, d, e, f = affine
    for y in range(height):
        for x in range(width):
            from_y, from_x = (f + d * x + e * y) >> 16, (c + a * x + b * y) >> 16
            if 0 <= from_x < width and 0 <= from_y < height:
                result[y, x, 0] = view[from_y, from_x, 0]
                result[y, x, 1] = view[from_y, from_x, 1]
                result[y, x, 2] = view[from_y, from_x, 2]
            else:
                result[y, x, 0] = result[y, x, 1] = result[y, x, 2] = 0


@compiled
def operate(view, kind, level, factor, affine, tables, result):
    """Give `view` its operation, in place or into `result`; returns (where it is, the other one)."""
    height, width = view.shape[:2]
    if kind == COLOR:
        for y in range(height):
            for x in range(width):
                red, green, blue = view[y, x, 0], view[y, x, 1], view[y, x, 2]
                grey = luma(red, green, blue)
                view[y, x, 0] = blend(grey, red, factor)
                view[y, x, 1] = blend(grey, green, factor)
                view[y, x, 2] = blend(grey, blue, factor)
        return view, result
    if kind == SHARPNESS:
        sharpen(view, factor, result)
        return result, view
    if kind in (AUTO_CONTRAST, EQUALIZE):
        for channel in range(3):
            count_table(view, channel, kind, tables[channel])
    elif kind in (BRIGHTNESS, CONTRAST, POSTERIZE, SOLARIZE):
        value_table(view, kind, level, factor, tables[0])
        tables[1:] = tables[0]
    else:
        move(view, affine, result)
        return result, view
    for y in range(height):
        for x in range(width):
            for channel in range(3):
                view[y, x, channel] = tables[channel, view[y, x, channel]]
    return view, result


@compiled
def make_views(
    first, last, images, sources, flip, crop, operation, level, sign, corner,
    maps, factors, normal, pad, cutout, zero_padded, out,
):  # fmt: skip
    """The views first..last - 1 into `out` [N, H, W, 3], whose values are those of `normal` [256, 3]."""
    height, width = images.shape[1:3]
    weak = len(sources) - len(operation)
    view, other = np.empty((height, width, 3), np.uint8), np.empty((height, width, 3), np.uint8)
    tables = np.empty((3, 256), np.uint8)
    for n in range(first, last):
        r = n - weak
        read(images[sources[n]], crop[n, 0] - pad, crop[n, 1] - pad, flip[n] != 0, n < zero_padded, view)
        if r >= 0:
            for turn in range(operation.shape[1]):
                kind, strength = operation[r, turn], level[r, turn]
                if kind != IDENTITY:
                    affine = maps[kind, strength, 1 if sign[r, turn] < 0 else 0]
                    view, other = operate(view, kind, strength, factors[strength], affine, tables, other)
            if cutout > 0:
                y, x = corner[r]
                view[y : y + cutout + 1, x : x + cutout + 1] = CUTOUT_FILL
        for y in range(height):
            for x in range(width):
                for channel in range(3):
                    out[n, y, x, channel] = normal[channel, view[y, x, channel]]


@cache
def constants(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Affine maps of every operation, level and sign, int32 [14, 10, 2, 6]; enhancement factors, float32 [10]."""
    maps = [affine_table(name, height, width, torch.device("cpu")) for name in OPERATIONS]
    return torch.stack(maps).numpy(), enhance(torch.arange(10)).numpy()


@cache
def workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


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
    zero_padded: int,
) -> Tensor:
    """See `semi_fast.ops.rand_augment.rand_augment`; on as many threads as torch uses."""
    height, width = images.shape[1:3]
    out = torch.empty(len(sources), height, width, 3, dtype=dtype)
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, 3)
    normal = normalise(ramp, mean, std, dtype)[0, :, :, 0].contiguous()  # [3, 256]
    bits = BITS[out.element_size()]
    arrays = [x.contiguous().numpy() for x in (images, sources, *parameters)]
    rest = *constants(height, width), normal.view(bits).numpy(), pad, cutout, zero_padded, out.view(bits).numpy()
    threads = max(1, min(torch.get_num_threads(), len(sources)))
    if threads == 1:
        make_views(0, len(sources), *arrays, *rest)
    else:
        ends = [len(sources) * i // threads for i in range(threads + 1)]
        list(workers(threads).map(lambda i: make_views(ends[i], ends[i + 1], *arrays, *rest), range(threads)))
    return out.permute(0, 3, 1, 2)
