"""SeMi's pseudo-labels: prototypes mixed into the prediction, both targets, masks, the hardness weight and counts."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from semi_fast.ops.door import FLOATS, expect, fits, has_kernel
from semi_fast.ops.pseudo_label import reference
from semi_fast.ops.pseudo_label.reference import hardness_weight, prototype_probs

__all__ = ["PseudoLabels", "hardness_weight", "prototype_probs", "pseudo_label"]


class PseudoLabels(NamedTuple):
    """What the unlabeled images are taken for; floats are float32, in a float64 run float64."""

    label: Tensor  # int64 [U], for the standard head
    confidence: Tensor  # float [U], of `label`
    mask: Tensor  # bool [U]
    hardness: Tensor  # float [U], the hardness weight before masking
    adjusted_label: Tensor  # int64 [U], for the balanced head
    adjusted_mask: Tensor  # bool [U]
    probs: Tensor  # float [U, C], the mixed distribution
    counts: Tensor  # int64 [C], kept rows per label


@torch.no_grad()
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
    renormalize: bool = True,
    mask_source: Literal["or", "linear"] = "or",
    entropy_source: Literal["mixed", "linear"] = "mixed",
    balanced_mask: Literal["or", "own_adjusted"] = "or",
) -> PseudoLabels:
    """Targets and masks of both heads for U unlabeled images; no gradient.

    logits, balanced_logits: float [U, C] of the weak view; queries: float [U, D]; prototypes: float [C, D] with valid:
    bool [C]; mixing: float [C], the weight of the prototypes' vote, 0 while it is off; adjustment: float [C], strength
    * log prior, taken off the logits for the labels of the balanced head; hardness_scale: float scalar tensor, 0 while
    the weighting is off (weight 1). `semi_fast.schema.semi` explains the options. The mixed rows are normalised again
    (`renormalize`) except where nothing is mixed: there they stay as they are, bit for bit. Equal probabilities: the
    lower class. Raises ValueError for a wrong shape, type, device or option. Source: SeMi eq. 3, 8, 11.
    """
    device, floats = logits.device, FLOATS
    expect("logits", logits, (None, None), floats, device)
    rows, classes = logits.shape
    expect("balanced_logits", balanced_logits, (rows, classes), floats, device)
    expect("queries", queries, (rows, None), floats, device)
    expect("prototypes", prototypes, (classes, queries.shape[1]), floats, device)
    expect("valid", valid, (classes,), (torch.bool,), device)
    for name, tensor in (("mixing", mixing), ("adjustment", adjustment)):
        expect(name, tensor, (classes,), floats, device)
    expect("hardness_scale", hardness_scale, (), floats, device)
    for name, value, known in (
        ("mask_source", mask_source, ("or", "linear")),
        ("entropy_source", entropy_source, ("mixed", "linear")),
        ("balanced_mask", balanced_mask, ("or", "own_adjusted")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value}")
    if classes < 2:
        raise ValueError(f"logits must have at least 2 classes; got {classes}")
    inputs = logits, balanced_logits, queries, prototypes, valid, mixing, adjustment, hardness_scale
    if has_kernel(device) and fits("pseudo_label", classes) and logits.dtype != torch.float64:
        from semi_fast.ops.pseudo_label import kernel

        found = kernel.pseudo_label(
            *(x.contiguous() for x in inputs),
            threshold,
            prototype_temperature,
            renormalize,
            mask_source,
            entropy_source,
            balanced_mask,
        )
    else:
        found = reference.pseudo_label(
            *inputs,
            threshold=threshold,
            prototype_temperature=prototype_temperature,
            renormalize=renormalize,
            mask_source=mask_source,
            entropy_source=entropy_source,
            balanced_mask=balanced_mask,
        )
    return PseudoLabels(*found)
