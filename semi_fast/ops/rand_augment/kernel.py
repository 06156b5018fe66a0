"""The views in one launch per operation: a program makes one view, reading pixels through crop and affine map."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton gives its launcher no types)
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from semi_fast.ops.rand_augment.reference import CUTOUT_FILL, OPERATIONS, affine_coefficients, enhance

INDEX = {name: tl.constexpr(index) for index, name in enumerate(OPERATIONS)}
IDENTITY, COLOR, SHARPNESS = INDEX["identity"], INDEX["color"], INDEX["sharpness"]
AUTO_CONTRAST, EQUALIZE = INDEX["auto_contrast"], INDEX["equalize"]
BRIGHTNESS, CONTRAST = INDEX["brightness"], INDEX["contrast"]
POSTERIZE, SOLARIZE = INDEX["posterize"], INDEX["solarize"]
GREY = tl.constexpr(CUTOUT_FILL)
# Two pixels a thread at a time; and no multiplication fused with an addition, which would round once less.
LAUNCH = {"BLOCK": 512, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def read(image_ptr, y, x, there, height, width, top, left, flip, zero):
    """int32 red, green and blue at (y, x) of a view: pixels of its image, mirrored, padded and cropped."""
    y, x = y + top, x + left
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    there = there & (inside | (zero == 0))
    y = height - 1 - tl.abs(height - 1 - tl.abs(y))
    x = width - 1 - tl.abs(width - 1 - tl.abs(x))
    x = tl.where(flip != 0, width - 1 - x, x)
    pixel_ptr = image_ptr + (y * width + x) * 3
    red = tl.load(pixel_ptr, mask=there, other=0).to(tl.int32)
    green = tl.load(pixel_ptr + 1, mask=there, other=0).to(tl.int32)
    blue = tl.load(pixel_ptr + 2, mask=there, other=0).to(tl.int32)
    return red, green, blue


@triton.jit
def luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def blend(degenerate, value, factor):
    base = degenerate.to(tl.float32)
    return (base + factor * (value.to(tl.float32) - base)).to(tl.int32)


@triton.jit
def count_table(counts, pixels, kind):
    """What auto_contrast or equalize makes of the values 0..255, from their counts."""
    values = tl.arange(0, 256)
    seen = counts > 0
    high = tl.max(tl.where(seen, values, 0), 0)
    table = values
    if kind == AUTO_CONTRAST:
        low = tl.min(tl.where(seen, values, 255), 0)
        if high > low:
            scale = tl.full((), 255, tl.float64) / (high - low).to(tl.float64)
            stretched = values.to(tl.float64) * scale - low.to(tl.float64) * scale
            table = tl.minimum(tl.maximum(stretched.to(tl.int32), 0), 255)
    else:
        step = (pixels - tl.sum(tl.where(values == high, counts, 0), 0)) // 255
        if step > 0:
            table = tl.minimum((step // 2 + tl.cumsum(counts, 0) - counts) // step, 255)
    return table


@triton.jit
def value_table(kind, level, factor, grey):
    """What posterize, solarize, or a blend with `grey` makes of the values 0..255."""
    values = tl.arange(0, 256)
    table = values
    if kind == POSTERIZE:
        table = values & ((0xFF00 >> (4 + level * 4 // 10)) & 0xFF)
    elif kind == SOLARIZE:
        table = tl.where(values < 256 - level * 256 // 10, values, 255 - values)
    else:
        table = blend(grey, values, factor)
    return table


@triton.jit
def normalise(value, mean, std, WIDE: tl.constexpr):
    """(value / 255 - mean) / std, rounded to nearest after each step."""
    if WIDE:
        result = (value.to(tl.float64) / tl.full((), 255, tl.float64) - mean) / std
    else:
        result = tl.div_rn(tl.div_rn(value.to(tl.float32), tl.full((), 255, tl.float32)) - mean, std)
    return result


@triton.jit
def view_kernel(
    images_ptr,  # [n, H, W, 3]
    previous_ptr,  # [R, H, W, 3], what the turn before made of the strong views
    sources_ptr,  # [N]
    flip_ptr,  # [N]
    crop_ptr,  # [N, 2]
    operation_ptr,  # [R, turns], as are level and sign
    level_ptr,
    sign_ptr,
    cutout_ptr,  # [R, 2]
    mean_ptr,  # [3]
    std_ptr,
    affine_ptr,  # [14, 10, 2, 6]
    factor_ptr,  # [10]
    out_ptr,  # [N, H, W, 3] in the last turn, else [R, H, W, 3]
    weak,
    height,
    width,
    pad,
    cutout,
    zero_padded,
    turn,
    turns,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program if LAST else program + weak  # the view
    r = n - weak  # its strong row, if at least 0
    pixels = height * width
    kind, level, mirrored = IDENTITY, 0, 0
    if (r >= 0) & (turns > 0):
        kind = tl.load(operation_ptr + r * turns + turn).to(tl.int32)
        level = tl.load(level_ptr + r * turns + turn).to(tl.int32)
        mirrored = (tl.load(sign_ptr + r * turns + turn) < 0).to(tl.int32)

    if (r >= 0) & (turn > 0):
        image_ptr = previous_ptr + r * pixels * 3
        top, left, flip, zero = 0, 0, 0, 0
    else:
        image_ptr = images_ptr + tl.load(sources_ptr + n) * pixels * 3
        top = tl.load(crop_ptr + n * 2).to(tl.int32) - pad
        left = tl.load(crop_ptr + n * 2 + 1).to(tl.int32) - pad
        flip = tl.load(flip_ptr + n).to(tl.int32)
        zero = (n < zero_padded).to(tl.int32)

    values = tl.arange(0, 256)
    red_table, green_table, blue_table = values, values, values
    factor = tl.load(factor_ptr + level)
    counted = (kind == AUTO_CONTRAST) | (kind == EQUALIZE)
    looked_up = counted | (kind == BRIGHTNESS) | (kind == CONTRAST) | (kind == POSTERIZE) | (kind == SOLARIZE)
    if counted:
        red_counts = tl.zeros((256,), tl.int32)
        green_counts = tl.zeros((256,), tl.int32)
        blue_counts = tl.zeros((256,), tl.int32)
        for start in range(0, pixels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            y, x, there = at // width, at % width, at < pixels
            red, green, blue = read(image_ptr, y, x, there, height, width, top, left, flip, zero)
            red_counts += tl.histogram(red, 256, mask=there)
            green_counts += tl.histogram(green, 256, mask=there)
            blue_counts += tl.histogram(blue, 256, mask=there)
        red_table = count_table(red_counts, pixels, kind)
        green_table = count_table(green_counts, pixels, kind)
        blue_table = count_table(blue_counts, pixels, kind)
    elif looked_up:
        grey = 0  # what brightness blends with
        if kind == CONTRAST:
            total = tl.zeros((), tl.int64)
            for start in range(0, pixels, BLOCK):
                at = start + tl.arange(0, BLOCK)
                y, x, there = at // width, at % width, at < pixels
                red, green, blue = read(image_ptr, y, x, there, height, width, top, left, flip, zero)
                total += tl.sum(tl.where(there, luma(red, green, blue), 0), 0)
            grey = ((2 * total + pixels) // (2 * pixels)).to(tl.int32)  # the mean, rounded half up
        table = value_table(kind, level, factor, grey)
        red_table, green_table, blue_table = table, table, table

    map_ptr = affine_ptr + ((kind * 10 + level) * 2 + mirrored) * 6  # the identity but for geometric operations
    a, b, c = tl.load(map_ptr), tl.load(map_ptr + 1), tl.load(map_ptr + 2)
    d, e, f = tl.load(map_ptr + 3), tl.load(map_ptr + 4), tl.load(map_ptr + 5)
    box_y, box_x, box = 0, 0, -1  # no pixel is in this box
    if LAST:
        if (r >= 0) & (cutout > 0):
            box_y = tl.load(cutout_ptr + r * 2).to(tl.int32)
            box_x = tl.load(cutout_ptr + r * 2 + 1).to(tl.int32)
            box = cutout
        exact = tl.float64 if WIDE else tl.float32
        mean_red = tl.load(mean_ptr).to(exact)
        mean_green = tl.load(mean_ptr + 1).to(exact)
        mean_blue = tl.load(mean_ptr + 2).to(exact)
        std_red = tl.load(std_ptr).to(exact)
        std_green = tl.load(std_ptr + 1).to(exact)
        std_blue = tl.load(std_ptr + 2).to(exact)

    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y, x, there = at // width, at % width, at < pixels
        from_y, from_x = (f + d * x + e * y) >> 16, (c + a * x + b * y) >> 16
        inside = there & (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        red, green, blue = read(image_ptr, from_y, from_x, inside, height, width, top, left, flip, zero)
        if looked_up:
            red = tl.gather(red_table, red, 0)
            green = tl.gather(green_table, green, 0)
            blue = tl.gather(blue_table, blue, 0)
        elif kind == COLOR:
            grey = luma(red, green, blue)
            red, green, blue = blend(grey, red, factor), blend(grey, green, factor), blend(grey, blue, factor)
        elif kind == SHARPNESS:
            inner = there & (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
            reds, greens, blues = red * 4, green * 4, blue * 4
            for i in range(9):
                near_y, near_x = y + i // 3 - 1, x + i % 3 - 1
                u, v, w = read(image_ptr, near_y, near_x, inner, height, width, top, left, flip, zero)
                reds, greens, blues = reds + u, greens + v, blues + w
            # the 13-part kernel, rounded to nearest; the border stays as it is
            red = blend(tl.where(inner, (2 * reds + 13) // 26, red), red, factor)
            green = blend(tl.where(inner, (2 * greens + 13) // 26, green), green, factor)
            blue = blend(tl.where(inner, (2 * blues + 13) // 26, blue), blue, factor)
        pixel_ptr = out_ptr + program * pixels * 3 + at * 3
        kept = out_ptr.dtype.element_ty
        if LAST:
            filled = (y >= box_y) & (y <= box_y + box) & (x >= box_x) & (x <= box_x + box)
            red = tl.where(filled, GREY, red)
            green = tl.where(filled, GREY, green)
            blue = tl.where(filled, GREY, blue)
            tl.store(pixel_ptr, normalise(red, mean_red, std_red, WIDE).to(kept), mask=there)
            tl.store(pixel_ptr + 1, normalise(green, mean_green, std_green, WIDE).to(kept), mask=there)
            tl.store(pixel_ptr + 2, normalise(blue, mean_blue, std_blue, WIDE).to(kept), mask=there)
        else:
            tl.store(pixel_ptr, red.to(kept), mask=there)
            tl.store(pixel_ptr + 1, green.to(kept), mask=there)
            tl.store(pixel_ptr + 2, blue.to(kept), mask=there)


@cache
def constants(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Affine maps of every operation, level and sign, int32 [14, 10, 2, 6]; enhancement factors, float32 [10].

    Kept per device: only the first step copies them there, and a captured one must not.
    """
    maps = [
        [[affine_coefficients(name, level, sign, height, width) for sign in (1, -1)] for level in range(10)]
        for name in OPERATIONS
    ]
    return torch.tensor(maps, dtype=torch.int32, device=device), enhance(torch.arange(10)).to(device)


@torch.library.custom_op("semi_fast::rand_augment", mutates_args=())
def rand_augment(
    images: Tensor,
    sources: Tensor,
    flip: Tensor,
    crop: Tensor,
    operation: Tensor,
    level: Tensor,
    sign: Tensor,
    corner: Tensor,
    mean: Tensor,
    std: Tensor,
    pad: int,
    cutout: int,
    zero_padded: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `semi_fast.ops.rand_augment.rand_augment`; every tensor contiguous."""
    (height, width), views, (rows, turns) = images.shape[1:3], len(sources), operation.shape
    parameters = sources, flip, crop, operation, level, sign, corner, mean, std
    tables = constants(height, width, images.device)
    scalars = views - rows, height, width, pad, cutout, zero_padded
    previous = images  # not read in the first turn
    for turn in range(max(turns, 1)):
        last = turn >= turns - 1
        programs = views if last else rows
        out = torch.empty(programs, height, width, 3, dtype=dtype if last else torch.uint8, device=images.device)
        if programs:
            view_kernel[(programs,)](
                images,
                previous,
                *parameters,
                *tables,
                out,
                *scalars,
                turn,
                turns,
                LAST=last,
                WIDE=dtype == torch.float64,
                **LAUNCH,
            )
        previous = out
    return previous.permute(0, 3, 1, 2)


@rand_augment.register_fake
def _(
    images: Tensor,
    sources: Tensor,
    flip: Tensor,
    crop: Tensor,
    operation: Tensor,
    level: Tensor,
    sign: Tensor,
    corner: Tensor,
    mean: Tensor,
    std: Tensor,
    pad: int,
    cutout: int,
    zero_padded: int,
    dtype: torch.dtype,
) -> Tensor:
    height, width = images.shape[1:3]
    return images.new_empty((len(sources), height, width, 3), dtype=dtype).permute(0, 3, 1, 2)
