"""Weak and strong views of uint8 images, exact to the pixel: flip, crop, operations, cutout, normalise."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.door import FLOATS, expect, has_compiled_views, has_kernel
from semi_fast.ops.rand_augment import reference
from semi_fast.ops.rand_augment.reference import IDENTITY, OPERATIONS, ViewParameters, apply_operations, normalise

__all__ = ["IDENTITY", "OPERATIONS", "ViewParameters", "apply_operations", "normalise", "rand_augment"]

LONGEST_SIDE = 4096  # 16.16 fixed point leaves 32 bits beyond it


@torch.no_grad()
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
    """All views of a step in one call: `dtype` [N, 3, H, W], stored NHWC (channels_last).

    `images` is uint8 [n, H, W, 3] and `sources` int64 [N] says which image a view shows. Every view is mirrored, padded
    by reflection (the first `zero_padded` views by black) and cropped; the last R = len(parameters.operation) views
    then get their operations, one column after the other, and a cutout of `cutout` pixels (0: none). `mean` and `std`
    are float [3], of values in [0, 1]. Every value of `sources` and `parameters` must lie in its range: they are on
    the device and not looked at here. Raises ValueError for a wrong shape, type, device or number.
    """
    device = images.device
    expect("images", images, (None, None, None, 3), (torch.uint8,), device)
    expect("sources", sources, (None,), (torch.int64,), device)
    expect("parameters.operation", parameters.operation, (None, None), (torch.int64,), device)
    (height, width), views, (rows, turns) = images.shape[1:3], len(sources), parameters.operation.shape
    shapes = {
        "flip": (views,),
        "crop": (views, 2),
        "level": (rows, turns),
        "sign": (rows, turns),
        "cutout": (rows, 2),
    }
    for name, shape in shapes.items():
        expect(f"parameters.{name}", getattr(parameters, name), shape, (torch.int64,), device)
    expect("mean", mean, (3,), FLOATS, device)
    expect("std", std, (3,), FLOATS, device)
    if rows > views:
        raise ValueError(f"parameters.operation must have at most {views} rows; got {rows}")
    if not 1 <= min(height, width) <= max(height, width) <= LONGEST_SIDE:
        raise ValueError(f"images must have sides of 1..{LONGEST_SIDE} pixels; got {height} x {width}")
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad must lie in 0..{min(height, width) - 1}; got {pad}")
    if cutout < 0:
        raise ValueError(f"cutout must be at least 0; got {cutout}")
    if not 0 <= zero_padded <= views:
        raise ValueError(f"zero_padded must lie in 0..{views}; got {zero_padded}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be a floating-point type; got {dtype}")
    if has_kernel(device):
        from semi_fast.ops.rand_augment import kernel

        tensors = (x.contiguous() for x in (images, sources, *parameters, mean, std))
        return kernel.rand_augment(*tensors, pad, cutout, zero_padded, dtype)
    make = reference.rand_augment
    if has_compiled_views(device):
        from semi_fast.ops.rand_augment import cpu

        make = cpu.rand_augment
    return make(
        images,
        sources,
        parameters,
        pad=pad,
        cutout=cutout,
        mean=mean,
        std=std,
        dtype=dtype,
        zero_padded=zero_padded,
    )
