"""Reference of SeMi's embedding alignment (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding_align(
    weak: Tensor, strong: Tensor, center: Tensor, coefficient: Tensor, *, temperature: float, teacher_temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss, target): (1 / R) * sum of coefficient * H(target, softmax(strong / temperature)), and the target [n, D].

    weak: float [n, D] (no gradient); strong: float [R, D], row r of image r mod n; center: [D]; coefficient: [n].
    target = softmax((weak - center) / teacher_temperature). A row with coefficient 0 adds exactly 0, also where its
    features are not finite; only `strong` receives a gradient.
    """
    if strong.shape[1:] != weak.shape[1:] or len(strong) % max(len(weak), 1):
        raise ValueError(f"strong must be [S * {len(weak)}, {weak.shape[1]}]; got {tuple(strong.shape)}")
    target = torch.softmax((weak.detach() - center) / teacher_temperature, 1)  # [n, D]
    views = len(strong) // max(len(weak), 1)
    coefficient = coefficient.to(strong.dtype).repeat(views)  # [R]
    kept = coefficient != 0
    log_probs = torch.log_softmax(torch.where(kept.unsqueeze(1), strong, 0.0) / temperature, 1)
    losses = -(target.repeat(views, 1) * log_probs).sum(1)
    return torch.where(kept, coefficient * losses, 0.0).sum() / max(len(strong), 1), target
