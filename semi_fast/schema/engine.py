"""Configuration of the loop: when it logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the averaged weights."""

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    batch: int = 512
    """Images per evaluation forward, over all processes."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under the run directory."""

    every: int = 5000
    """Steps between checkpoints; 0 for none but the last."""
    keep: int = 2
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class LogConfig:
    """Progress and trackers."""

    every: int = 100
    """Steps between progress lines; the only time the loop waits for the device."""
    track: tuple[str, ...] = ()
    """accelerate trackers to report to, such as tensorboard or wandb."""
