"""The operations of SeMi after the forward, on the rows of a step, beside the structure of the released code."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import IMAGES, SEED, SLOTS, WIDTH, Case, Goal, Operation, repeated
from benchmarks.measure import Work
from benchmarks.reference import semi_step
from semi_fast.methods import memory_bank

SELECTED = 0.9  # share of the rows offered to the bank
GOALS_OF_PUSH = {10: 8.0, 127: 4.0}  # by classes: how often the loop's CPU time must hold ours while the bank fills


class Offer(NamedTuple):
    """What a step offers to the bank; both strong views of an image have its label, confidence and mask."""

    features: Tensor  # [R, D]
    labels: Tensor  # [R]
    confidences: Tensor  # [R]
    mask: Tensor  # [R]


class Stream(NamedTuple):
    """Pushes and where they go."""

    name: str
    pushes: int
    imbalance: float  # how much more frequent the first class is than the last
    stored: float  # confidence in every slot at the start; 0 for an empty bank


STREAMS = (
    Stream("filling, even labels", 11, 1, 0.0),  # 11 pushes fill 10 classes of 128 slots: nearly every row enters
    Stream("filling, long-tailed labels", 32, 100, 0.0),  # frequent classes are full soon, rare ones stay open
    Stream("full", 16, 1, 0.9999),
)


def make_offers(classes: int, stream: Stream, device: torch.device) -> list[Offer]:
    generator = torch.Generator().manual_seed(SEED)
    shares = stream.imbalance ** -(torch.arange(classes) / (classes - 1))
    offers = []
    for _ in range(stream.pushes):
        labels = torch.multinomial(shares, IMAGES, replacement=True, generator=generator)
        confidences = 0.7 + 0.3 * torch.rand(IMAGES, generator=generator)
        mask = torch.rand(IMAGES, generator=generator) < SELECTED
        features = torch.randn(2 * IMAGES, WIDTH, generator=generator)
        offers.append(Offer(features.to(device), *(x.repeat(2).to(device) for x in (labels, confidences, mask))))
    return offers


def bank_push(device: torch.device) -> list[Case]:
    return [bank_case(classes, stream, device) for classes in GOALS_OF_PUSH for stream in STREAMS]


def bank_case(classes: int, stream: Stream, device: torch.device) -> Case:
    offers, rows = make_offers(classes, stream, device), 2 * IMAGES
    start = memory_bank.empty(classes, SLOTS, WIDTH, device=device, dtype=torch.float32)
    if stream.stored:
        start["bank.confidences"].fill_(stream.stored)
        start["bank.inserted"].copy_(torch.arange(classes * SLOTS).view(classes, SLOTS))
    first = classes * SLOTS + torch.arange(rows, device=device)
    numbers = [first + push * rows for push in range(stream.pushes)]

    def work(push: Operation) -> Work:
        state = {name: value.clone() for name, value in start.items()}
        bank = [state[f"bank.{name}"] for name in ("features", "confidences", "inserted", "sums")]

        def reset() -> None:
            for name, value in start.items():
                state[name].copy_(value)

        def phase(offer: Offer, number: Tensor) -> Callable[[], object]:
            return lambda: push(*bank, *offer, number, oldest_leaves=False)

        return Work([phase(*row) for row in zip(offers, numbers, strict=True)], reset)

    plain = semi_step.empty_bank(classes, SLOTS, WIDTH, device)

    def reset_plain() -> None:
        plain.features.zero_()
        plain.confidences.fill_(stream.stored)
        plain.accepted = [[] for _ in range(classes)]

    def plain_phase(offer: Offer) -> Callable[[], object]:
        return lambda: semi_step.push(plain, *offer, semi_step.insert_official)

    loop = Work([plain_phase(offer) for offer in offers], reset_plain)
    loop.run()
    selected, entered = sum(int(offer.mask.sum()) for offer in offers), sum(map(len, plain.accepted))
    means = f"{selected / stream.pushes:.0f} rows selected, {entered / stream.pushes:.0f} enter"
    goals = () if stream.stored else (Goal("cpu", "loop_over_ours_ratio", GOALS_OF_PUSH[classes], True),)
    return Case(
        "bank_push",
        f"C={classes} M={SLOTS} D={WIDTH} R={rows}, {stream.name} ({stream.pushes} pushes, {means})",
        work,
        loop,
        goals=(*goals, Goal("cuda", "kernel_captured_us", 20.0, False)),
    )


def pseudo_label(device: torch.device) -> list[Case]:
    return [pseudo_label_case(classes, device) for classes in (10, 127)]


def pseudo_label_case(classes: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    logits, balanced_logits = 3 * normal(IMAGES, classes), 3 * normal(IMAGES, classes)
    queries, prototypes = normal(IMAGES, WIDTH), normal(classes, WIDTH)
    valid = torch.ones(classes, dtype=torch.bool, device=device)
    mixing = torch.full((classes,), 0.4 / classes, device=device)
    adjustment = 2 * torch.log_softmax(normal(classes), 0)
    hardness_scale = torch.tensor(0.75, device=device)
    inputs = logits, balanced_logits, queries, prototypes, valid, mixing, adjustment, hardness_scale
    options = {
        "threshold": 0.7,
        "prototype_temperature": 0.1,
        "renormalize": True,
        "mask_source": "or",
        "entropy_source": "mixed",
        "balanced_mask": "or",
    }
    counts, exact = torch.zeros(classes, dtype=torch.int64, device=device), adjustment.double()

    def plain() -> None:
        found = semi_step.pseudo_labels(logits, balanced_logits, queries, prototypes, mixing, exact)
        semi_step.count_classes(counts, found.label, found.mask)

    shape = f"U={IMAGES} C={classes} D={WIDTH}"
    return Case("pseudo_label", shape, lambda op: repeated(lambda: op(*inputs, **options)), repeated(plain))


def masked_cross_entropy(device: torch.device) -> list[Case]:
    return [cross_entropy_case(classes, device) for classes in (10, 127)]


def cross_entropy_case(classes: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.randn(2 * IMAGES, classes, generator=generator).to(device).requires_grad_()
    target = torch.randint(classes, (IMAGES,), generator=generator).to(device)
    coefficient = (torch.rand(IMAGES, generator=generator) - 0.5).clamp_min(0).to(device)
    return Case(
        "masked_cross_entropy",
        f"R={2 * IMAGES} C={classes}, forward and backward",
        lambda op: repeated(lambda: torch.autograd.grad(op(logits, target, coefficient, None), logits)),
        repeated(lambda: torch.autograd.grad(semi_step.masked_cross_entropy(logits, target, coefficient), logits)),
    )


def embedding_align(device: torch.device) -> list[Case]:
    generator = torch.Generator().manual_seed(SEED)
    weak = torch.randn(IMAGES, WIDTH, generator=generator).to(device)
    strong = torch.randn(2 * IMAGES, WIDTH, generator=generator).to(device).requires_grad_()
    center = torch.full((WIDTH,), 1 / WIDTH, device=device)
    coefficient = (torch.rand(IMAGES, generator=generator) < 0.5).float().to(device)
    inputs, options = (weak, strong, center, coefficient), {"temperature": 0.09, "teacher_temperature": 0.018}

    def call(op: Operation) -> Callable[[], object]:
        return lambda: torch.autograd.grad(op(*inputs, **options)[0], strong)

    def plain() -> None:
        torch.autograd.grad(semi_step.embedding_align(*inputs)[0], strong)

    shape = f"n={IMAGES} R={2 * IMAGES} D={WIDTH}, forward and backward"
    return [Case("embedding_align", shape, lambda op: repeated(call(op)), repeated(plain))]
