"""Cross-entropy of rows against the targets of their images, with a coefficient per image."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.door import FLOATS, expect, fits, has_kernel
from semi_fast.ops.masked_cross_entropy import reference

__all__ = ["masked_cross_entropy"]


def masked_cross_entropy(
    logits: Tensor, target: Tensor, coefficient: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """(1 / R) * sum over rows of coefficient * CE(logits + offset, target): a scalar; differentiable in `logits`.

    logits: float [R, C], R a multiple of n; target: classes int64 [n] or distributions float [n, C], which need not
    sum to 1; coefficient: float [n], without it 1; offset: float [C], such as a log prior. Row r belongs to image
    r mod n. The sum is over all R rows, masked or not: the divisor is not the number of kept rows. A row whose
    coefficient is 0 is left out, not multiplied: it adds exactly 0 to value and gradient even where its logits are not
    finite. Computed in float32, in float64 for float64 logits. Raises ValueError for a wrong shape, type or device.
    """
    device = logits.device
    expect("logits", logits, (None, None), FLOATS, device)
    rows, classes = logits.shape
    if target.ndim == 2:
        expect("target", target, (None, classes), FLOATS, device)
    else:
        expect("target", target, (None,), (torch.int64,), device)
    images = len(target)
    if rows % max(images, 1) or (rows and not images):
        raise ValueError(f"target must have a number of rows that divides the {rows} of logits; got {images}")
    if coefficient is not None:
        expect("coefficient", coefficient, (images,), FLOATS, device)
    if offset is not None:
        expect("offset", offset, (classes,), FLOATS, device)
    if has_kernel(device) and fits("masked_cross_entropy", classes) and logits.dtype != torch.float64 and rows:
        from semi_fast.ops.masked_cross_entropy import kernel

        losses, _ = kernel.masked_cross_entropy(
            *(None if x is None else x.contiguous() for x in (logits, target, coefficient, offset))
        )
        return losses.sum()
    return reference.masked_cross_entropy(logits, target, coefficient, offset)
