"""The class-balanced memory bank with confidence decay: M slots a class, as plain tensors in a method's state."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.bank_push import bank_push

State = dict[str, Tensor]


def empty(classes: int, slots: int, features: int, *, device: torch.device, dtype: torch.dtype) -> State:
    """features [C, M, D], confidences [C, M] (0: empty slot), inserted int64 [C, M] (insertion number, -1: empty), and
    sums float64 [C, D], of each class's features: in float64 what enters and leaves them over a run does not add up to
    an error that float32 would show."""
    return {
        "bank.features": torch.zeros(classes, slots, features, device=device, dtype=dtype),
        "bank.confidences": torch.zeros(classes, slots, device=device, dtype=dtype),
        "bank.inserted": torch.full((classes, slots), -1, device=device, dtype=torch.int64),
        "bank.sums": torch.zeros(classes, features, device=device, dtype=torch.float64),
    }


def numbers(step: Tensor, rows: int) -> Tensor:
    """Insertion numbers of the rows that a step offers, int64 [R]: step * R + row."""
    return step * rows + torch.arange(rows, device=step.device)


def push(
    state: State,
    features: Tensor,
    labels: Tensor,
    confidences: Tensor,
    mask: Tensor,
    step: Tensor,
    *,
    oldest_leaves: bool = False,
) -> None:
    """Offer R rows in order, in place (see `ops.bank_push`)."""
    bank_push(
        state["bank.features"],
        state["bank.confidences"],
        state["bank.inserted"],
        state["bank.sums"],
        features,
        labels,
        confidences,
        mask,
        numbers(step, len(labels)),
        oldest_leaves=oldest_leaves,
    )


def decay(state: State, factor: Tensor) -> None:
    """Multiply confidences by `factor`, a scalar tensor or [C, M], in place (SeMi eq. 7)."""
    state["bank.confidences"].mul_(factor)


def filled(state: State) -> Tensor:
    """bool [C, M]: which slots hold a row."""
    return state["bank.inserted"] >= 0


def prototypes(state: State) -> tuple[Tensor, Tensor]:
    """(mean of each class's filled slots [C, D], zeros where there is none; bool [C]: classes that have any)."""
    count = filled(state).sum(1)
    means = state["bank.sums"] / count.clamp_min(1).unsqueeze(1)
    return means.to(state["bank.features"].dtype), count > 0
