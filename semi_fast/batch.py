"""The rows of a batch: the legend of axes, the order of rows, and the one function that cuts them.

Axes, everywhere in this project:

    B  labeled rows            S  strong views          C  classes
    U  unlabeled images        N  rows of one forward   D  features
    M  slots per class         H W  image               R  S * U, the strong rows

Row order, everywhere: `[labeled | weak | strong_0 | strong_1 ...]`, so N = B + (1 + S) * U.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class RowLayout(NamedTuple):
    """How many rows of each kind this process forwards in a step."""

    labeled: int
    unlabeled: int
    strong_views: int

    @property
    def images(self) -> int:
        """Distinct images: B + U."""
        return self.labeled + self.unlabeled

    @property
    def total(self) -> int:
        """Rows of one forward: N."""
        return self.labeled + (1 + self.strong_views) * self.unlabeled


class Rows(NamedTuple):
    """What the step is given: pixels, who they are, and the labels of the labeled rows alone."""

    images: Tensor  # uint8 [B + U, H, W, 3], labeled first
    ids: Tensor  # int64 [B + U], sample ids
    visits: Tensor  # int64 [B + U], how often the row's own stream has come round before
    labels: Tensor  # int64 [B]
    layout: RowLayout


class Outputs(NamedTuple):
    """What one forward gives, in row order."""

    features: Tensor  # float [N, D], pooled, not normalised
    logits: dict[str, Tensor]  # head -> float [N, C]
    classify: Callable[[Tensor], dict[str, Tensor]] | None = None  # the heads, for other features [n, D]


class SplitRows(NamedTuple):
    """A tensor of N rows, cut: views of the same memory."""

    labeled: Tensor  # [B, ...]
    weak: Tensor  # [U, ...]
    strong: Tensor  # [S * U, ...], strong_0 first; row r shows image r mod U


def split_rows(rows: Tensor, layout: RowLayout) -> SplitRows:
    """Cut a tensor whose first axis is the N rows of one forward."""
    if rows.shape[0] != layout.total:
        raise ValueError(f"rows must have {layout.total} rows ({layout}); got {tuple(rows.shape)}")
    labeled, weak, strong = rows.split([layout.labeled, layout.unlabeled, layout.strong_views * layout.unlabeled])
    return SplitRows(labeled, weak, strong)
