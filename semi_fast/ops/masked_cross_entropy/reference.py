"""Reference of the masked, weighted cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def masked_cross_entropy(logits: Tensor, target: Tensor, coefficient: Tensor | None, offset: Tensor | None) -> Tensor:
    """See `semi_fast.ops.masked_cross_entropy.masked_cross_entropy`."""
    views = len(logits) // max(len(target), 1)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    if offset is not None:
        exact = exact + offset
    if coefficient is None and len(logits):
        return cross_entropy(exact, target.repeat(views, *(1 for _ in target.shape[1:])))
    coefficient = exact.new_zeros(0) if coefficient is None else coefficient.to(exact.dtype).repeat(views)  # [R]
    kept = coefficient != 0
    exact = torch.where(kept.unsqueeze(1), exact, 0.0)
    if target.ndim == 2:
        target = target.to(exact.dtype).repeat(views, 1)
        losses = -torch.where(target != 0, target * torch.log_softmax(exact, 1), 0.0).sum(1)
    else:
        losses = cross_entropy(exact, target.repeat(views), reduction="none")
    return torch.where(kept, coefficient * losses, 0.0).sum() / max(len(logits), 1)
