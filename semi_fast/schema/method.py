"""Configuration of the methods: each owns the options under its own name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from semi_fast.schema.semi import ReleasedSemiConfig, SemiConfig


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
class MethodConfig:
    """The method, what is stacked on it, and the clock that its schedules count in."""

    name: Literal["supervised", "fixmatch", "semi", "released_semi"] = "semi"
    """Which method."""
    plugins: tuple[Literal["la"], ...] = ()
    """What is stacked on supervised or FixMatch: la = logit adjustment."""
    epoch_steps: int = 500
    """Steps that the schedules of a method call an epoch; not a pass over the data."""
    fixmatch: FixMatchConfig = field(default_factory=FixMatchConfig)
    la: LogitAdjustmentConfig = field(default_factory=LogitAdjustmentConfig)
    semi: SemiConfig = field(default_factory=SemiConfig)
    released_semi: ReleasedSemiConfig = field(default_factory=ReleasedSemiConfig)
