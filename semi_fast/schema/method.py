"""Configuration of the methods: each owns the options under its own name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class FixMatchConfig:
    """FixMatch: confident predictions on the weak view are the targets of the strong views."""

    threshold: float = 0.95
    """Confidence from which a pseudo-label counts (tau)."""
    unlabeled_weight: float = 1.0
    """Weight of the unlabeled term (lambda_u)."""
    strong_views: int = 2
    """Strong views per unlabeled image; 1 in the original, 2 in the imbalanced protocols that SeMi compares in."""


@dataclass(frozen=True)
class LogitAdjustmentConfig:
    """Logit adjustment, three independent switches; `strength * log prior` is the adjustment."""

    strength: float = 1.0
    """Factor on the log prior (tau of logit adjustment)."""
    train: bool = True
    """Add the adjustment to the labeled logits in the loss."""
    pseudo_label: bool = False
    """Subtract it from the logits that pseudo-labels are made from."""
    predict: bool = False
    """Subtract it from the logits that are evaluated; not together with `train`, which would correct twice."""


@dataclass(frozen=True)
class SemiConfig:
    """SeMi, preset `default`: the resolution column of the decision table."""

    preset: Literal["default"] = "default"
    """Which reading of the paper."""
    threshold: float = 0.7
    """Confidence from which a pseudo-label counts (tau)."""
    hardness_scale: float = 0.75
    """Span of the entropy weight (s); weights lie in [1 - s, 1]."""
    mixing: float = 0.4
    """Weight of the prototypes' vote at the end of training (alpha)."""
    prototype_temperature: float = 0.1
    """Temperature of the softmax over distances to prototypes (T_p)."""
    alignment_weight: float = 0.15
    """Weight of the embedding alignment (lambda_EA)."""
    alignment_temperature: float = 0.09
    """Temperature of the strong views' features (T_e)."""
    alignment_sharpening: float = 5.0
    """The weak view's temperature is T_e divided by this."""
    center_momentum: float = 0.9
    """Momentum of the centre taken from the weak features (of q-bar)."""
    adjustment: float = 2.0
    """Factor on the log prior for the balanced head (T_b)."""
    bank_slots: int = 128
    """Slots per class of the memory bank (M)."""
    bank_decay: float = 0.99
    """Factor on every stored confidence (beta) ..."""
    bank_decay_every: int = 100
    """... every so many steps (n)."""
    warmup_epochs: int = 20
    """Epochs (of `method.epoch_steps`) before mixing, entropy weights and alignment begin."""


@dataclass(frozen=True)
class MethodConfig:
    """The method, what is stacked on it, and the clock that its schedules count in."""

    name: Literal["supervised", "fixmatch", "semi"] = "semi"
    """Which method."""
    plugins: tuple[Literal["la"], ...] = ()
    """What is stacked on supervised or FixMatch: la = logit adjustment."""
    epoch_steps: int = 500
    """Steps that the schedules of a method call an epoch; not a pass over the data."""
    fixmatch: FixMatchConfig = field(default_factory=FixMatchConfig)
    la: LogitAdjustmentConfig = field(default_factory=LogitAdjustmentConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
