"""Schedules: pure functions of the step, on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_7_16(step: Tensor, *, base: float, steps: int) -> Tensor:
    """Learning rate of update `step` (0-based, int64 scalar): base * cos(7 pi step / (16 steps)), float64.

    It ends at 0.195 of the base. Source: FixMatch; no warm-up.
    """
    return base * torch.cos(step.double() * (7 * math.pi / (16 * steps)))


def ema_weight(step: Tensor, *, decay: float, ramp: bool) -> Tensor:
    """What the weights after update `step` count in the average: 1 - decay, or with a ramp at least 1 / (step + 1)."""
    fixed = torch.full_like(step, 1 - decay, dtype=torch.float64)
    return torch.maximum(fixed, 1 / (step.double() + 1)) if ramp else fixed
