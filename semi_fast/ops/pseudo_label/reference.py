"""Reference of SeMi's pseudo-labels (eq. 3, 8, 11), without gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PseudoLabels(NamedTuple):
    """What the unlabeled images are taken for."""

    label: Tensor  # int64 [U], for the standard head
    confidence: Tensor  # float [U], of `label`
    mask: Tensor  # bool [U]
    hardness: Tensor  # float [U], the hardness weight before masking
    balanced_label: Tensor  # int64 [U], for the balanced head
    balanced_mask: Tensor  # bool [U]


def hardness_weight(probs: Tensor, scale: Tensor | float) -> Tensor:
    """1 - scale + scale * (entropy of each row / log C): in [1 - scale, 1], more for unsure rows; [n] from [n, C]."""
    p = probs.clamp(1e-8, 1 - 1e-8)
    return 1 - scale - scale * (p * p.log()).sum(1) / math.log(probs.shape[1])


def prototype_probs(queries: Tensor, prototypes: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """softmax(-distance / temperature) over the valid classes, 0 for the others (and all 0 where none is): [n, C].

    queries: [n, D]; prototypes: [C, D]; valid: bool [C]. Plain Euclidean distance, by direct differences: the
    expanded form |q|^2 - 2 qc + |c|^2 loses its digits when queries and prototypes cluster.
    """
    compute_mode = "donot_use_mm_for_euclid_dist"
    scores = -torch.cdist(queries, prototypes, compute_mode=compute_mode) / temperature
    probs = torch.softmax(scores.masked_fill(~valid, -torch.inf), 1)
    return torch.where(valid, probs, 0.0)  # with no valid class the softmax is NaN and every entry is replaced


@torch.no_grad()
def pseudo_label(
    logits: Tensor,
    balanced_logits: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    mixing: Tensor,
    adjustment: Tensor,
    *,
    threshold: float,
    prototype_temperature: float,
    hardness_scale: Tensor,
) -> PseudoLabels:
    """Targets and masks of both heads for U unlabeled images.

    logits, balanced_logits: [U, C] of the weak view; queries: [U, D] features of strong_0; prototypes: [C, D] with
    valid: bool [C]; mixing: [C], the weight of the prototypes' vote in each class column, 0 while it is off;
    adjustment: [C] = strength * log prior; hardness_scale: scalar tensor, 0 while the weighting is off (weight 1).
    The rows are normalised again after mixing, except where nothing is mixed: there they stay as they are, bit for bit.
    """
    for name, tensor in (("balanced_logits", balanced_logits), ("logits", logits)):
        if tensor.shape != (len(queries), len(prototypes)):
            raise ValueError(f"{name} must be [{len(queries)}, {len(prototypes)}]; got {tuple(tensor.shape)}")
    probs = torch.softmax(logits, 1)
    weight = torch.where(valid, mixing, 0.0)  # [C]
    mixed = (1 - weight) * probs + weight * prototype_probs(queries, prototypes, valid, prototype_temperature)
    mixed = torch.where((weight > 0).any(), mixed / mixed.sum(1, keepdim=True), probs)
    confidence, label = mixed.max(1)

    balanced_confidence, balanced_label = torch.softmax(logits - adjustment, 1).max(1)
    own_confidence = torch.softmax(balanced_logits, 1).amax(1)
    return PseudoLabels(
        label=label,
        confidence=confidence,
        mask=(confidence >= threshold) | (probs.amax(1) >= threshold),
        hardness=hardness_weight(mixed, hardness_scale),
        balanced_label=balanced_label,
        balanced_mask=(balanced_confidence >= threshold) | (own_confidence >= threshold),
    )
