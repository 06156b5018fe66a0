"""What a row of `benchmarks.ops` is: an operation, its input, the plain code beside it, and bounds to hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.measure import Work

Operation = Callable[..., Any]

SEED = 0
IMAGES, SLOTS, WIDTH = 64, 128, 128  # U, M, D of the published setting; two strong views each
PAPER_STEPS, PAPER_EVALUATIONS = 250_000, 500  # of a published run
CALLS = 20  # of a small operation in one repeat


class Goal(NamedTuple):
    """A bound on one column, judged on one kind of device."""

    device: str
    column: str
    bound: float
    at_least: bool


@dataclass(frozen=True)
class Case:
    """One row: an operation, its input, and how to call it and the plain code on that input."""

    operation: str
    shape: str
    work: Callable[[Operation], Work]  # the same calls for reference, compiled reference and kernel
    loop: Work
    strong_views: int = 0
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.operation} {self.shape}"


def repeated(call: Callable[[], object]) -> Work:
    return Work([call] * CALLS)
