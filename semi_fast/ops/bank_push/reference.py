"""Reference of the bank's insertion: a sort per class, no loop over rows, no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def bank_push(
    features: Tensor,
    confidences: Tensor,
    inserted: Tensor,
    new_features: Tensor,
    new_labels: Tensor,
    new_confidences: Tensor,
    mask: Tensor,
    number: Tensor,
) -> None:
    """Offer R rows to the bank, in place; the result is that of offering them one after the other.

    State: features [C, M, D], confidences [C, M] (0: empty), inserted int64 [C, M] (-1: empty). Offered, in order:
    new_features [R, D], new_labels int64 [R], new_confidences [R], mask bool [R], number int64 [R], rising and above
    every number in the bank. A row enters if its mask is set and its confidence is strictly above the lowest of its
    class; the lowest leaves, among equals the one inserted last. So each class keeps the first M in the order
    (confidence descending, number ascending). A NaN confidence does not enter.
    """
    classes, slots = confidences.shape
    offered = mask & (new_confidences > 0)  # false for NaN too
    mine = offered & (new_labels == torch.arange(classes, device=mask.device).unsqueeze(1))  # [C, R]
    all_confidences = torch.cat([confidences, torch.where(mine, new_confidences, -1.0)], 1)  # [C, M + R]
    all_numbers = torch.cat([inserted, number.expand(classes, -1)], 1)
    by_number = all_numbers.argsort(dim=1, stable=True)
    by_confidence = all_confidences.gather(1, by_number).argsort(dim=1, descending=True, stable=True)
    kept = by_number.gather(1, by_confidence[:, :slots])  # [C, M]
    keep = torch.zeros_like(all_confidences, dtype=torch.bool).scatter_(1, kept, True)

    # The k-th row that enters a class takes the k-th slot that is freed there: as many enter as leave.
    freed = keep[:, :slots].to(torch.int8).argsort(dim=1, stable=True)  # slots to be freed first, in slot order
    enters = keep[:, slots:]  # [C, R]
    rank = enters.cumsum(1) - 1
    k = new_labels.clamp(0, classes - 1)
    row = torch.arange(len(k), device=k.device)
    slot = freed[k, rank[k, row].clamp_min(0)]
    target = torch.where(enters[k, row], k * slots + slot, classes * slots)  # [R]; the last place is thrown away
    for state, value in (
        (features.view(-1, features.shape[2]), new_features),
        (confidences.view(-1), new_confidences),
        (inserted.view(-1), number),
    ):
        padded = torch.cat([state, torch.zeros_like(state[:1])])
        state.copy_(padded.index_copy_(0, target, value.to(state.dtype))[:-1])
