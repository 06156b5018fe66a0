"""The range of every number of the configuration: what a step, a file's name, memory and float32 can carry."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, each with it unless it is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """An open end is not reached by rounding to float32 either; integers are never rounded."""
        rounded = single(value) if isinstance(value, float) else value
        above = self.low < min(value, rounded) if self.open_low else self.low <= value
        return above and (max(value, rounded) < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        return f"{'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"


def single(value: float) -> float:
    """The float32 next to a float64; infinite beyond the largest."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


SHARE, MOMENTUM, POSITIVE_SHARE = Range(0, 1), Range(0, 1, open_high=True), Range(0, 1, open_low=True)
STEPS = Range(1, 999_999_999)  # nine digits of a checkpoint's name
COUNT, IMAGES, ROWS = Range(0, 999_999_999), Range(0, 10**9), Range(1, 2**20)
PIXELS = Range(0, 2**14)
SEED = Range(0, 2**64 - 1)  # Philox's key
RATIO = Range(1, 1e9)
WEIGHT = Range(0, 1e6)
TEMPERATURE = Range(1e-6, 1e6)  # logits over it, and sharpened, stay far from float32's ends
RANGES = {
    "seed": SEED,
    "data.threads": Range(1, 1024),
    "split.labeled_max": Range(1, 10**9),
    "split.unlabeled_max": IMAGES,
    "split.imbalance_labeled": RATIO,
    "split.imbalance_unlabeled": RATIO,
    "split.validation_per_class": IMAGES,
    "split.seed": SEED,
    "split.labeled_fraction": POSITIVE_SHARE,
    "batch.labeled": ROWS,
    "batch.unlabeled_ratio": Range(1, 1024),
    "augment.pad": PIXELS,
    "augment.cutout": PIXELS,
    "augment.operations": Range(0, 8),
    "model.bn_momentum": POSITIVE_SHARE,
    "optim.steps": STEPS,
    "optim.lr": Range(1e-30, 1e30),
    "optim.momentum": MOMENTUM,
    "optim.weight_decay": WEIGHT,
    "ema.decay": MOMENTUM,
    "engine.ddp_parameters": Range(0, 10**15),
    "engine.timeout_seconds": Range(1, 10**8),
    "eval.every": STEPS,
    "eval.batch": ROWS,
    "checkpoint.every": COUNT,
    "checkpoint.keep": STEPS,
    "log.every": STEPS,
    "method.epoch_steps": STEPS,
    "method.fixmatch.threshold": POSITIVE_SHARE,
    "method.fixmatch.unlabeled_weight": WEIGHT,
    "method.fixmatch.strong_views": Range(1, 64),
    "method.la.strength": WEIGHT,
    "method.semi.threshold": POSITIVE_SHARE,
    "method.semi.strong_views": Range(1, 64),
    "method.semi.hardness_scale": SHARE,
    "method.semi.mixing": SHARE,
    "method.semi.prototype_temperature": TEMPERATURE,
    "method.semi.bank_slots": ROWS,
    "method.semi.bank_decay": POSITIVE_SHARE,
    "method.semi.bank_decay_every": STEPS,
    "method.semi.bank_sampling": Range(0, 2**20),
    "method.semi.alignment_weight": WEIGHT,
    "method.semi.alignment_temperature": TEMPERATURE,
    "method.semi.alignment_sharpening": TEMPERATURE,
    "method.semi.center_momentum": MOMENTUM,
    "method.semi.adjustment": WEIGHT,
    "method.semi.pseudo_label_adjustment": WEIGHT,
    "method.semi.prior_momentum": MOMENTUM,
    "method.semi.warmup_epochs": COUNT,
    "method.released_semi.threshold": POSITIVE_SHARE,
    "method.released_semi.mixing": SHARE,
    "method.released_semi.hardness_scale": SHARE,
    "method.released_semi.bank_slots": ROWS,
    "method.released_semi.bank_decay_every": STEPS,
    "method.released_semi.alignment_weight": WEIGHT,
    "method.released_semi.alignment_temperature": TEMPERATURE,
    "method.released_semi.warmup_epochs": COUNT,
}


def rules(values: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(holds, message) for every number among `values`, by dotted key; None has no range."""
    for key, bounds in RANGES.items():
        if (value := values.get(key)) is not None:
            yield bounds.holds(value), f"{key} must lie in {bounds}; got {value}"


def must_hold(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise ValueError with the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
