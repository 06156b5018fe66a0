"""What the released code of SeMi does to features otherwise than its paper says, for ablation: preset `official`.

Source: the description of the released snapshot in the project's specification, 2.3 to 2.9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.batch import RowLayout
from semi_fast.methods.memory_bank import State, numbers


def scrambled(features: Tensor, layout: RowLayout) -> Tensor:
    """[N, D]: interleaved in groups of 4 for the network and not put back; place B * b + a holds row 4 * a + b."""
    if not layout.labeled == layout.unlabeled == len(features) // 4:
        raise ValueError(f"feature_order official needs B = U and 2 strong views; got {layout}")
    return features.view(layout.labeled, 4, -1).transpose(0, 1).reshape(len(features), -1)


def push(state: State, features: Tensor, labels: Tensor, confidences: Tensor, mask: Tensor, step: Tensor) -> None:
    """Offer R rows one by one, in place; classes stay sorted by confidence.

    A row above the lowest confidence of its class replaces that confidence, but of the features the first row, that of
    the highest confidence, is dropped; the new row then goes to the place of its confidence in both. So confidences
    are the M highest, and features are not theirs. A loop over rows: slow, and only here.
    """
    stored, inserted = state["bank.confidences"], state["bank.inserted"]
    (classes, slots), rows = stored.shape, len(labels)
    place = torch.arange(slots, device=labels.device)
    number = numbers(step, rows)
    held = place.repeat(classes, 1)  # [C, M]: which of (M slots, R rows) a place of the features shows
    for r in range(rows):
        k = labels[r : r + 1]
        confidence = confidences[r].to(stored.dtype)
        mine, age, shows = (x.index_select(0, k)[0] for x in (stored, inserted, held))
        at = (mine[:-1] >= confidence).sum()
        accepted = mask[r] & (confidence > mine[-1])

        def insert(old: Tensor, new: Tensor | int, shift: int, at: Tensor = at, accepted: Tensor = accepted) -> Tensor:
            moved = torch.where(place < at, old if shift == 1 else old.roll(-1), old.roll(1) if shift == 1 else old)
            return torch.where(accepted, torch.where(place == at, new, moved), old).unsqueeze(0)

        stored.index_copy_(0, k, insert(mine, confidence, 1))
        inserted.index_copy_(0, k, insert(age, number[r], 1))
        held.index_copy_(0, k, insert(shows, slots + r, -1))
    old = rearranged(state["bank.features"], held.clamp_max(slots - 1))
    new = features.to(old.dtype)[(held - slots).clamp_min(0)]
    hold(state, torch.where((held < slots).unsqueeze(2), old, new))


def sort_by_confidence(state: State) -> None:
    """Sort every class by falling confidence, features along with it, in place: what follows a decay."""
    order = state["bank.confidences"].argsort(dim=1, descending=True, stable=True)
    for name in ("bank.confidences", "bank.inserted"):
        state[name].copy_(state[name].gather(1, order))
    hold(state, rearranged(state["bank.features"], order))


def rearranged(features: Tensor, order: Tensor) -> Tensor:
    """features [C, M, D] with the slots of each class in `order`, int64 [C, M]."""
    return features.gather(1, order.unsqueeze(2).expand_as(features))


def hold(state: State, features: Tensor) -> None:
    """Put `features` into the bank, and their sums."""
    state["bank.features"].copy_(features)
    state["bank.sums"].copy_(features.double().sum(1))
