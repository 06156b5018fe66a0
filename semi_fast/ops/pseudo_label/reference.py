"""Reference of SeMi's pseudo-labels (eq. 3, 8, 11), without gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def mix(probs: Tensor, vote: Tensor, weight: Tensor, *, renormalize: bool) -> Tensor:
    """The prediction with the prototypes' vote mixed in (eq. 8): [n, C]; where nothing is mixed, `probs` bit for bit.

    weight: [C]; class k takes weight[k] of its vote.
    """
    mixed = (1 - weight) * probs + weight * vote
    if renormalize:
        mixed = torch.where((weight > 0).any(), mixed / mixed.sum(1, keepdim=True), mixed)
    return mixed


def pseudo_label(
    logits: Tensor,
    balanced_logits: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    mixing: Tensor,
    adjustment: Tensor,
    hardness_scale: Tensor,
    *,
    threshold: float,
    prototype_temperature: float,
    renormalize: bool,
    mask_source: str,
    entropy_source: str,
    balanced_mask: str,
) -> tuple[Tensor, ...]:
    """See `semi_fast.ops.pseudo_label.pseudo_label`; the fields of `PseudoLabels` in order."""
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, balanced_logits, queries = (x.to(exact) for x in (logits, balanced_logits, queries))
    probs = torch.softmax(logits, 1)
    vote = prototype_probs(queries, prototypes.to(exact), valid, prototype_temperature)
    weight = torch.where(valid, mixing, 0.0)  # [C]
    mixed = mix(probs, vote, weight, renormalize=renormalize)
    confidence, label = mixed.max(1)
    mask = probs.amax(1) >= threshold
    if mask_source == "or":
        mask |= confidence >= threshold

    adjusted_confidence, adjusted_label = torch.softmax(logits - adjustment, 1).max(1)
    if balanced_mask == "or":
        own_confidence = torch.softmax(balanced_logits, 1).amax(1)
        adjusted_mask = (adjusted_confidence >= threshold) | (own_confidence >= threshold)
    else:
        adjusted_mask = torch.softmax(balanced_logits - adjustment, 1).amax(1) >= threshold
    classes = torch.arange(logits.shape[1], device=logits.device)
    return (
        label,
        confidence,
        mask,
        hardness_weight(mixed if entropy_source == "mixed" else probs, hardness_scale),
        adjusted_label,
        adjusted_mask,
        mixed,
        (mask & (label == classes.unsqueeze(1))).sum(1),  # [C]
    )
