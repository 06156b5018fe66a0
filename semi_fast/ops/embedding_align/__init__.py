"""Alignment of the features of strong views with a sharpened, centred distribution from the weak view."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.door import FLOATS, expect, fits, has_kernel
from semi_fast.ops.embedding_align import reference

__all__ = ["embedding_align"]


def embedding_align(
    weak: Tensor, strong: Tensor, center: Tensor, coefficient: Tensor, *, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss, target): (1 / R) * sum of coefficient * H(target, softmax(strong / temperature)), and the target [n, D].

    weak: float [n, D] (no gradient); strong: float [R, D], row r of image r mod n; center: float [D]; coefficient:
    float [n]. target = softmax((weak - center) / teacher_temperature), of all n rows. A row with coefficient 0 adds
    exactly 0, also where its features are not finite; only `strong` receives a gradient. Computed in float32, in
    float64 for float64 features. Raises ValueError for a wrong shape, type or device. Source: SeMi eq. 6.
    """
    device = strong.device
    expect("strong", strong, (None, None), FLOATS, device)
    rows, width = strong.shape
    expect("weak", weak, (None, width), FLOATS, device)
    images = len(weak)
    if rows % max(images, 1) or (rows and not images):
        raise ValueError(f"weak must have a number of rows that divides the {rows} of strong; got {images}")
    expect("center", center, (width,), FLOATS, device)
    expect("coefficient", coefficient, (images,), FLOATS, device)
    if has_kernel(device) and fits("embedding_align", width) and strong.dtype != torch.float64 and rows:
        from semi_fast.ops.embedding_align import kernel

        inputs = (x.contiguous() for x in (weak.detach(), strong, center, coefficient))
        losses, target, _ = kernel.embedding_align(*inputs, temperature, teacher_temperature)
        return losses.sum(), target
    return reference.embedding_align(
        weak, strong, center, coefficient, temperature=temperature, teacher_temperature=teacher_temperature
    )
