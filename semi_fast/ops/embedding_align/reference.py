"""Reference of SeMi's embedding alignment (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_align(
    weak: Tensor, strong: Tensor, center: Tensor, coefficient: Tensor, *, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """See `semi_fast.ops.embedding_align.embedding_align`."""
    exact = torch.float64 if strong.dtype == torch.float64 else torch.float32
    target = torch.softmax((weak.detach().to(exact) - center.to(exact)) / teacher_temperature, 1)  # [n, D]
    views = len(strong) // max(len(weak), 1)
    coefficient = coefficient.to(exact).repeat(views)  # [R]
    kept = coefficient != 0
    log_probs = torch.log_softmax(torch.where(kept.unsqueeze(1), strong.to(exact), 0.0) / temperature, 1)
    losses = -(target.repeat(views, 1) * log_probs).sum(1)
    return torch.where(kept, coefficient * losses, 0.0).sum() / max(len(strong), 1), target
