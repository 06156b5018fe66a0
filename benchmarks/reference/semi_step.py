"""SeMi's step outside the network with the structure and cost of the released code: loops, boolean masks, waits.

Written from sections 2.5 to 2.12 and 7.1 of a description of that code, not from the code; the numbers below are of
those sections. It is what the operations are timed against, and is no faster and no slower than it need be.

Counted on a CPU by a dispatch mode, a push of S selected rows of which A enter makes 6 + 10 * S + 27 * A calls of ATen,
the released code 8 + 10 * S + 27 * A. In both 1 + 2 * S + 9 * A of them read a value back, and 3 are selections by a
mask, which wait on a GPU; 8 kernels run for a row that enters and 1 for a row that does not. A test holds the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

DECAY = 0.99


@dataclass
class LoopBank:
    """The released bank: a class's slots are kept in the order of their confidences, highest first."""

    features: Tensor  # float [C, M, D], zeros at first
    confidences: Tensor  # float [C, M], 0 in an empty slot
    accepted: list[list[Tensor]] = field(default_factory=list)
    """Per class the confidences accepted since the last decay: scalars on the device (2.9)."""

    def __post_init__(self) -> None:
        self.accepted = [[] for _ in range(len(self.confidences))]


def empty_bank(classes: int, slots: int, width: int, device: torch.device) -> LoopBank:
    return LoopBank(torch.zeros(classes, slots, width, device=device), torch.zeros(classes, slots, device=device))


Insert = Callable[[LoopBank, Tensor, Tensor, Tensor], None]


def insert_official(bank: LoopBank, label: Tensor, feature: Tensor, confidence: Tensor) -> None:
    """Section 2.8: the lowest confidence is replaced, yet the first features leave and the new ones go last."""
    bank.features[label] = torch.cat([bank.features[label][1:], feature.unsqueeze(0)])
    bank.confidences[label, -1] = confidence
    ordered, order = bank.confidences[label].sort(descending=True)
    bank.confidences[label] = ordered
    bank.features[label] = bank.features[label][order]
    bank.accepted[label] += [confidence.clone()]


def insert_lowest(bank: LoopBank, label: Tensor, feature: Tensor, confidence: Tensor) -> None:
    """The same, corrected: features and confidence of the last slot are replaced together; ties keep their order."""
    bank.features[label, -1] = feature
    bank.confidences[label, -1] = confidence
    ordered, order = bank.confidences[label].sort(descending=True, stable=True)
    bank.confidences[label] = ordered
    bank.features[label] = bank.features[label][order]
    bank.accepted[label] += [confidence.clone()]


def push(bank: LoopBank, features: Tensor, labels: Tensor, confidences: Tensor, mask: Tensor, insert: Insert) -> None:
    """Section 2.7: offer the rows [R, D], [R], [R] that `mask` [R] selects, one by one, asking the device each time.

    It runs before the backward, so every row is detached on its own.
    """
    if torch.all(mask == 0):
        return
    features, labels, confidences = features[mask], labels[mask], confidences[mask]
    for row in range(len(labels)):
        feature, label, confidence = features[row].detach(), labels[row], confidences[row].detach()
        if confidence > bank.confidences[label][-1]:
            insert(bank, label, feature, confidence)


def decay(bank: LoopBank, factor: float = DECAY) -> None:
    """Section 2.9: lower what was not accepted since the last decay, found by equal values as often as they occur."""
    for k, accepted in enumerate(bank.accepted):
        stored = bank.confidences[k]
        recent = torch.tensor(accepted, dtype=stored.dtype, device=stored.device)  # waits for every element
        values, counts = torch.unique(stored, return_counts=True)
        recent_values, recent_counts = torch.unique(recent, return_counts=True)
        stale = ~torch.isin(stored, recent)
        repeated = values[torch.isin(values, recent_values) & (counts > 1)]
        for value in repeated:
            here = (stored == value).nonzero().squeeze(1)
            fresh = recent_counts[recent_values == value].item()
            stale[here[: max(len(here) - int(fresh), 0)]] = True
        lowered = stored.clone()
        lowered[stale] = stored[stale] * factor
        order = lowered.argsort(descending=True)
        bank.confidences[k] = lowered[order]
        bank.features[k] = bank.features[k][order]
        bank.accepted[k] = []


def prototypes(bank: LoopBank) -> Tensor:
    """Section 2.10: the mean over all slots of a class, empty ones included, anew in every step: [C, D]."""
    return bank.features.mean(1)


def prototypes_of_filled(bank: LoopBank) -> tuple[Tensor, Tensor]:
    """The same, corrected: (the mean over the filled slots [C, D], bool [C]: classes that have one)."""
    filled = (bank.confidences > 0).sum(1, keepdim=True)
    return bank.features.sum(1) / filled.clamp(min=1), filled.squeeze(1) > 0


def count_classes(counts: Tensor, labels: Tensor, mask: Tensor) -> None:
    """Section 2.6: add the selected pseudo-labels [U] to `counts` int64 [C], in place; waits twice."""
    counts += torch.bincount(labels[mask], minlength=len(counts))


class PlainLabels(NamedTuple):
    label: Tensor
    confidence: Tensor
    mask: Tensor
    hardness: Tensor
    balanced_label: Tensor
    balanced_mask: Tensor


@torch.no_grad()
def pseudo_labels(
    logits: Tensor,
    balanced_logits: Tensor,
    queries: Tensor,
    centers: Tensor,
    mixing: Tensor,
    adjustment: Tensor,
) -> PlainLabels:
    """Sections 2.5 and 2.11 for U images: prototypes' vote mixed column by column, rows left as they are.

    adjustment is float64 [C], as in the released code (2.1); temperature 0.1, threshold 0.7, entropy span 0.75.
    """
    probs = softmax(logits, 1)
    votes = softmax(-torch.cdist(queries, centers) / 0.1, 1)
    mixed = (1 - mixing) * probs + mixing * votes
    return labels_of(probs, mixed, logits, balanced_logits, adjustment, threshold=0.7, span=0.75)


@torch.no_grad()
def corrected_pseudo_labels(
    logits: Tensor,
    balanced_logits: Tensor,
    queries: Tensor,
    centers: tuple[Tensor, Tensor],
    mixing: Tensor,
    adjustment: Tensor,
    *,
    threshold: float,
    temperature: float,
    span: float,
) -> PlainLabels:
    """The same, corrected: only classes with a prototype vote (`centers` is what `prototypes_of_filled` gives), and
    the rows sum to 1."""
    probs = softmax(logits, 1)
    distances = torch.cdist(queries, centers[0]).masked_fill(~centers[1], 1e9)
    mixing = mixing * centers[1]
    mixed = (1 - mixing) * probs + mixing * softmax(-distances / temperature, 1)
    mixed = mixed / mixed.sum(1, keepdim=True)
    return labels_of(probs, mixed, logits, balanced_logits, adjustment, threshold=threshold, span=span)


@torch.no_grad()
def warm_up_labels(logits: Tensor, balanced_logits: Tensor, adjustment: Tensor, *, threshold: float) -> PlainLabels:
    """Before prototypes vote: the head's own prediction, every row as hard as the other."""
    probs = softmax(logits, 1)
    return labels_of(probs, probs, logits, balanced_logits, adjustment, threshold=threshold, span=None)


def labels_of(
    probs: Tensor,
    mixed: Tensor,
    logits: Tensor,
    balanced_logits: Tensor,
    adjustment: Tensor,
    *,
    threshold: float,
    span: float | None,
) -> PlainLabels:
    """Labels and masks of both heads from the predictions before and after mixing; no `span`: no entropy weights."""
    plain_confidence, _ = torch.max(probs, 1)
    confidence, label = torch.max(mixed, 1)
    mask = confidence.ge(threshold) + plain_confidence.ge(threshold)
    balanced_confidence, balanced_label = torch.max(softmax(logits - adjustment, 1), 1)
    own_confidence, _ = torch.max(softmax(balanced_logits, 1), 1)
    balanced_mask = balanced_confidence.ge(threshold) + own_confidence.ge(threshold)
    if span is None:
        hardness = torch.ones_like(confidence)
    else:
        clamped = mixed.clamp(1e-8, 1 - 1e-8)
        entropy = -(clamped * torch.log2(clamped)).sum(1) / torch.log2(torch.tensor(float(mixed.shape[1])))
        hardness = entropy * span + (1 - span)
    return PlainLabels(label, confidence, mask, hardness, balanced_label, balanced_mask)


def masked_cross_entropy(logits: Tensor, target: Tensor, coefficient: Tensor) -> Tensor:
    """Section 2.13's terms of the strong rows [R, C]: every row computed, then multiplied by its coefficient."""
    views = len(logits) // len(target)
    losses = cross_entropy(logits, torch.cat([target] * views), reduction="none")
    return (losses * torch.cat([coefficient] * views)).mean()


def embedding_align(
    weak: Tensor,
    strong: Tensor,
    center: Tensor,
    coefficient: Tensor,
    *,
    temperature: float = 0.09,
    sharpening: float = 5,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Section 2.12: (loss, new centre); the teacher's temperature is `sharpening` times lower."""
    views = len(strong) // len(weak)
    target = softmax((weak - center) / (temperature / sharpening), 1).detach()
    losses = torch.stack([-(target * log_softmax(rows / temperature, 1)).sum(1) for rows in strong.chunk(views)])
    loss = (losses * coefficient).mean()
    return loss, center * momentum + target.mean(0) * (1 - momentum)
