"""The views of a step: parameters drawn from (seed, stream, visit, sample id, view), pixels made in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from semi_fast.batch import Rows
from semi_fast.ops.rand_augment import IDENTITY, OPERATIONS, ViewParameters, rand_augment
from semi_fast.ops.rand_augment.reference import normalise
from semi_fast.philox import AUGMENT_LABELED, AUGMENT_UNLABELED, below, philox
from semi_fast.schema.data import AugmentConfig

# What a block of four words of one view decides; the operations follow as blocks 2, 3, ...
GEOMETRY, CUTOUT, FIRST_OPERATION = 0, 1, 2
LEVELS = 9  # 1..9


class ViewKey(NamedTuple):
    """Who asks for random words: int64 [n] each."""

    stream: Tensor
    visit: Tensor
    sample: Tensor
    view: Tensor


def words(seed: int, key: ViewKey, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words [n] of each view: counter (stream, visit, sample id, view << 16 | block)."""
    return philox(seed, (key.stream, key.visit, key.sample, (key.view << 16) | block))


class Augmenter:
    """Turns the rows of a step into all its views, in row order, on the rows' device."""

    def __init__(
        self,
        options: AugmentConfig,
        *,
        seed: int,
        resolution: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        dtype: torch.dtype,
    ):
        side = min(resolution)
        self.pad = side // 8 if options.pad is None else options.pad
        if not 0 <= self.pad < side:
            raise ValueError(f"augment.pad must lie in 0..{side - 1} for images of {resolution}; got {options.pad}")
        if options.cutout > side:
            raise ValueError(f"augment.cutout must be at most the image side {side}; got {options.cutout}")
        self.options, self.seed, self.resolution, self.dtype = options, seed, resolution, dtype
        self.mean, self.std = (torch.tensor(v, dtype=torch.float64, device=device) for v in (mean, std))

    def views(self, rows: Rows) -> Tensor:
        """float [N, 3, H, W] in the order [labeled | weak | strong_0 | ...], stored NHWC."""
        return rand_augment(
            rows.images,
            self.sources(rows),
            self.draw(rows),
            pad=self.pad,
            cutout=self.options.cutout,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )

    def plain(self, images: Tensor) -> Tensor:
        """Images uint8 [n, H, W, 3] as evaluation sees them: normalised, nothing else."""
        return normalise(images, self.mean, self.std, self.dtype)

    @staticmethod
    def sources(rows: Rows) -> Tensor:
        """Which of the B + U images each of the N views shows: int64 [N]."""
        labeled, unlabeled, strong_views = rows.layout
        index = torch.arange(labeled + unlabeled, device=rows.ids.device)
        return torch.cat([index, index[labeled:].repeat(strong_views)])

    def draw(self, rows: Rows) -> ViewParameters:
        """The parameters of every view; a function of the rows' ids and visits, not of their place in the batch."""
        labeled, unlabeled, strong_views = rows.layout
        at = self.sources(rows)
        stream = torch.where(at < labeled, AUGMENT_LABELED, AUGMENT_UNLABELED)
        strong = strong_views * unlabeled
        view = torch.arange(len(at), device=at.device) - labeled  # weak rows 0 .. U - 1, strong_0 from U on
        view = torch.div(view.clamp_min(0), max(unlabeled, 1), rounding_mode="floor")
        key = ViewKey(stream, rows.visits[at], rows.ids[at], view)
        flip, y, x, _ = words(self.seed, key, GEOMETRY)
        crop = torch.stack([below(y, 2 * self.pad + 1), below(x, 2 * self.pad + 1)], 1)

        key = ViewKey(*(field[len(at) - strong :] for field in key))
        chosen = [
            self.draw_operation(words(self.seed, key, FIRST_OPERATION + i)) for i in range(self.options.operations)
        ]
        empty = torch.zeros(strong, 0, dtype=torch.int64, device=at.device)
        operation, level, sign = (
            (torch.stack(field, 1) for field in zip(*chosen, strict=True)) if chosen else (empty, empty, empty)
        )
        cut_y, cut_x, _, _ = words(self.seed, key, CUTOUT)
        corner = [self.cutout_start(u, side) for u, side in zip((cut_y, cut_x), self.resolution, strict=True)]
        return ViewParameters(
            flip=below(flip, 2) * int(self.options.flip),
            crop=crop,
            operation=operation,
            level=level,
            sign=sign,
            cutout=torch.stack(corner, 1),
        )

    @staticmethod
    def draw_operation(word: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(operation, level, sign), each [n]: one of all operations, which then happens with probability 1/2."""
        which, level, happens, sign = word
        operation = torch.where(below(happens, 2) == 1, below(which, len(OPERATIONS)), IDENTITY)
        return operation, 1 + below(level, LEVELS), 2 * below(sign, 2) - 1

    def cutout_start(self, word: Tensor, side: int) -> Tensor:
        """floor(max(0, centre - size / 2)) for a centre uniform in [0, side): int64 [n]."""
        twice_centre = below(word, 2 * side)
        return torch.div(twice_centre - self.options.cutout, 2, rounding_mode="floor").clamp_min(0)
