"""Insertion into a bank that keeps the most confident rows of each class, and the sums of what it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops import door
from semi_fast.ops.bank_push import reference
from semi_fast.ops.door import FLOATS, expect, fits, has_kernel

__all__ = ["bank_push"]

STORED = (torch.float32, torch.float64)


@torch.no_grad()
def bank_push(
    features: Tensor,
    confidences: Tensor,
    inserted: Tensor,
    sums: Tensor,
    new_features: Tensor,
    new_labels: Tensor,
    new_confidences: Tensor,
    mask: Tensor,
    number: Tensor,
    *,
    oldest_leaves: bool = False,
) -> None:
    """Offer R rows to the bank, in place; the result is that of offering them one after the other.

    State: features float32 or float64 [C, M, D], confidences of the same type [C, M] (0: empty slot), inserted int64
    [C, M] (-1: empty slot), sums float64 [C, D], kept equal to the sum of each class's slots. Offered, in order:
    new_features float [R, D], new_labels int64 [R], new_confidences float [R], mask bool [R], number int64 [R], rising
    and above every number in the bank.

    A row is offered if its mask is set and its confidence is above 0 (a NaN is not). It enters if that is strictly
    above the lowest of its class; the lowest leaves, among equals the one inserted last. So each class keeps the first
    M in the order (confidence descending, number ascending). With `oldest_leaves` every offered row enters and the row
    with the lowest number leaves. Which slot a row takes is not part of the contract. Raises ValueError for a wrong
    shape, type or device. Source: SeMi section 3.2; `inserted` makes its order total.
    """
    device = features.device
    expect("features", features, (None, None, None), STORED, device)
    expect("new_labels", new_labels, (None,), (torch.int64,), device)
    (classes, slots, width), rows = features.shape, len(new_labels)
    expect("confidences", confidences, (classes, slots), (features.dtype,), device)
    expect("inserted", inserted, (classes, slots), (torch.int64,), device)
    expect("sums", sums, (classes, width), (torch.float64,), device)
    expect("new_features", new_features, (rows, width), FLOATS, device)
    expect("new_confidences", new_confidences, (rows,), FLOATS, device)
    expect("mask", mask, (rows,), (torch.bool,), device)
    expect("number", number, (rows,), (torch.int64,), device)
    state = features, confidences, inserted, sums
    for name, tensor in zip(("features", "confidences", "inserted", "sums"), state, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: it is changed in place")
    if not rows:
        return
    offered = new_features, new_labels, new_confidences, mask, number
    if has_kernel(device) and fits("bank_push", max(slots, rows)):
        from semi_fast.ops.bank_push import kernel

        kernel.bank_push(*state, *(x.contiguous() for x in offered), oldest_leaves)
        return
    if door.values_at_hand(device):  # leave out the rows that cannot enter
        lowest = confidences.amin(1)[new_labels.clamp(0, classes - 1)] if not oldest_leaves else 0
        able = (mask & (new_confidences > lowest)).nonzero().squeeze(1)
        if not len(able):
            return
        offered = tuple(x[able] for x in offered)
    reference.bank_push(*state, *offered, oldest_leaves=oldest_leaves)
