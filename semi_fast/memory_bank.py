"""The class-balanced memory bank with confidence decay: M slots a class, as plain tensors in a method's state."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.bank_push import bank_push

State = dict[str, Tensor]


def empty(classes: int, slots: int, features: int, *, device: torch.device, dtype: torch.dtype) -> State:
    """features [C, M, D], confidences [C, M] (0: empty slot), inserted int64 [C, M] (insertion number, -1: empty)."""
    return {
        "bank.features": torch.zeros(classes, slots, features, device=device, dtype=dtype),
        "bank.confidences": torch.zeros(classes, slots, device=device, dtype=dtype),
        "bank.inserted": torch.full((classes, slots), -1, device=device, dtype=torch.int64),
    }


def push(state: State, features: Tensor, labels: Tensor, confidences: Tensor, mask: Tensor, step: Tensor) -> None:
    """Offer R rows in order, in place; their insertion numbers are step * R + row (see `ops.bank_push`)."""
    number = step * len(labels) + torch.arange(len(labels), device=labels.device)
    bank = state["bank.features"], state["bank.confidences"], state["bank.inserted"]
    bank_push(*bank, features, labels, confidences, mask, number)


def decay(state: State, factor: Tensor) -> None:
    """Multiply every confidence by `factor`, a scalar tensor, in place (SeMi eq. 7)."""
    state["bank.confidences"].mul_(factor)


def filled(state: State) -> Tensor:
    """bool [C, M]: which slots hold a row."""
    return state["bank.inserted"] >= 0


def prototypes(state: State) -> tuple[Tensor, Tensor]:
    """(mean of each class's filled slots [C, D], zeros where there is none; bool [C]: has any)."""
    taken = filled(state)
    count = taken.sum(1)
    sums = (state["bank.features"] * taken.unsqueeze(2)).sum(1)
    return sums / count.clamp_min(1).unsqueeze(1), count > 0
