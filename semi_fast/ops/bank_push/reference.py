"""Reference of the bank's insertion: two small sorts, no loop over rows, no wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def worst_first(priority: Tensor, number: Tensor) -> Tensor:
    """Per row, the order (priority ascending, number descending): int64, shape of `priority`."""
    newest_first = number.argsort(dim=-1, descending=True, stable=True)
    return newest_first.gather(-1, priority.gather(-1, newest_first).argsort(dim=-1, stable=True))


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
    oldest_leaves: bool,
) -> None:
    """See `semi_fast.ops.bank_push.bank_push`.

    The best candidate of a class meets its worst slot, the second best the second worst, and so on; a candidate
    enters where it is strictly better. As candidates fall and slots rise, the pairs that exchange are the first ones,
    and their number is that of the sequential rule.
    """
    classes, slots = confidences.shape
    row = torch.arange(len(number), device=mask.device)
    offered = mask & (new_confidences > 0)  # false for NaN too
    first_slot = new_labels.clamp(0, classes - 1) * slots  # [R], in the flattened bank
    if oldest_leaves:  # the priority of a row is its age
        priority, new_priority = inserted, number
    else:
        priority, new_priority = confidences, new_confidences.to(confidences.dtype)

    # The rank of a row among the offered rows of its class: how many come before it in (priority falling, row rising).
    place = torch.empty_like(row)
    place[new_priority.argsort(descending=True, stable=True)] = row
    group = torch.where(offered, first_slot, -1 - row)  # a row that is not offered is alone
    before = (group.unsqueeze(0) == group.unsqueeze(1)) & (place.unsqueeze(0) < place.unsqueeze(1))
    rank = before.sum(1)  # [R]
    met = first_slot + worst_first(priority, inserted).view(-1)[first_slot + rank.clamp_max(slots - 1)]
    enters = offered & (rank < slots) & (new_priority > priority.view(-1)[met])

    # Where a row does not enter, do again what the first entering row does, or nothing: shapes stay fixed.
    any_enters, first = enters.max(0)
    source = torch.where(enters, row, first)
    target = met[source]
    flat = features.view(classes * slots, -1)
    old = flat[target]
    new = torch.where(any_enters, new_features[source].to(old.dtype), old)
    change = torch.where(enters.unsqueeze(1), new.double() - old, 0.0)
    sums.index_put_((torch.div(first_slot, slots, rounding_mode="floor"),), change, accumulate=True)
    flat.index_copy_(0, target, new)
    for state, values in ((confidences.view(-1), new_confidences), (inserted.view(-1), number)):
        state.index_copy_(0, target, torch.where(any_enters, values[source].to(state.dtype), state[target]))
