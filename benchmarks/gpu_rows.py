"""What a row of `benchmarks.gpu_suite` says, and how it is judged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import Spread, quartiles
from benchmarks.ops import UNSTEADY, digits

OK, FAILED, NOT_RUN, INCONCLUSIVE = "ok", "FAILED", "not run", "inconclusive"
NO_TIME = "no time was left"
"""The reason of what is not run but would be another time."""


class Row(NamedTuple):
    """One number, or one thing that holds or does not."""

    quantity: str
    value: str = ""
    low: str = ""
    high: str = ""
    unit: str = ""
    goal: str = ""
    verdict: str = ""
    n: int = 1
    note: str = ""


class Setting(NamedTuple):
    """What a section is given."""

    device: torch.device
    data: Path | None
    """A prepared data set."""
    small: bool
    """Sizes for trying it out."""
    until: float
    """When its time is spent, on time.monotonic."""
    seconds: float = 0
    """How many it had."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: int, small: int) -> int:
        return small if self.small else full


class Bound(NamedTuple):
    """What a quantity should keep, on a GPU."""

    value: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:,.15g}"


def measured(
    quantity: str,
    found: Spread | Sequence[float] | float,
    unit: str,
    setting: Setting,
    *,
    bound: Bound | None = None,
    steady: float = 1.0,
    n: int = 1,
    note: str = "",
) -> Row:
    """A number, of a list its quartiles; a bound must be kept by the whole interval, and is judged on a GPU alone.

    `steady` is the ratio of the same to itself: away from 1, nothing is said.
    """
    if isinstance(found, (int, float)):
        spread = Spread(float(found), float(found), float(found))
    elif isinstance(found, Spread):
        spread = found
    else:
        spread, n = quartiles(found), len(found)
    value, low, high = map(digits, spread)
    goal, verdict = "", ""
    if bound is not None:
        goal, verdict = str(bound), judge(spread, bound, steady) if setting.cuda and not setting.small else NOT_RUN
    return Row(quantity, value, low, high, unit, goal, verdict, n, note)


def judge(spread: Spread, bound: Bound, steady: float = 1.0) -> str:
    _, low, high = spread
    met, missed = (
        (low >= bound.value, high < bound.value) if bound.at_least else (high <= bound.value, low > bound.value)
    )
    if abs(steady - 1) > UNSTEADY:
        return INCONCLUSIVE
    return "met" if met else "missed" if missed else INCONCLUSIVE


def checked(quantity: str, value: float, unit: str, goal: str, holds: bool, *, n: int = 1, note: str = "") -> Row:
    """Something that must hold."""
    text = digits(value)
    return Row(quantity, text, text, text, unit, goal, OK if holds else FAILED, n, note)


def failed(quantity: str, error: BaseException | str) -> Row:
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(quantity, verdict=FAILED, note=" ".join(reason.split())[:300])


def not_run(quantity: str, reason: str) -> Row:
    return Row(quantity, verdict=NOT_RUN, note=reason)
