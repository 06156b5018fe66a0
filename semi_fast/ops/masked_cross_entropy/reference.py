"""Reference of the masked, weighted cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def masked_cross_entropy(logits: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """(1 / R) * sum over rows of coefficient * CE(logits, target): a scalar; differentiable in `logits`.

    logits: float [R, C], R a multiple of n; target: int64 [n]; coefficient: float [n]. Row r belongs to image r mod n.
    The sum is over all R rows, masked or not: the divisor is not the number of kept rows. A row whose coefficient is 0
    is left out, not multiplied: it adds exactly 0 to value and gradient even where its logits are not finite.
    """
    if target.ndim != 1 or len(logits) % max(len(target), 1):
        raise ValueError(f"target must be [n] with n dividing {len(logits)} rows; got {tuple(target.shape)}")
    if coefficient.shape != target.shape:
        raise ValueError(f"coefficient must be {tuple(target.shape)}; got {tuple(coefficient.shape)}")
    views = len(logits) // max(len(target), 1)
    target, coefficient = target.repeat(views), coefficient.to(logits.dtype).repeat(views)  # [R]
    kept = coefficient != 0
    losses = cross_entropy(torch.where(kept.unsqueeze(1), logits, 0.0), target, reduction="none")
    return torch.where(kept, coefficient * losses, 0.0).sum() / max(len(logits), 1)
