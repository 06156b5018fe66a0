"""Reference of the drawing: Philox words as integers below n, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from semi_fast.ops.rand_augment import IDENTITY, OPERATIONS, ViewParameters
from semi_fast.philox import AUGMENT_LABELED, AUGMENT_UNLABELED, below, philox

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


def draw_operation(word: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(operation, level, sign), each [n]: one of all operations, which then happens with probability 1/2."""
    which, level, happens, sign = word
    operation = torch.where(below(happens, 2) == 1, below(which, len(OPERATIONS)), IDENTITY)
    return operation, 1 + below(level, LEVELS), 2 * below(sign, 2) - 1


def cutout_start(word: Tensor, side: int, cutout: int) -> Tensor:
    """floor(max(0, centre - cutout / 2)) for a centre uniform in [0, side): int64 [n]."""
    twice_centre = below(word, 2 * side)
    return torch.div(twice_centre - cutout, 2, rounding_mode="floor").clamp_min(0)


def draw_views(
    ids: Tensor,
    visits: Tensor,
    *,
    labeled: int,
    unlabeled: int,
    strong_views: int,
    seed: int,
    resolution: tuple[int, int],
    flip: bool,
    pad: int,
    cutout: int,
    operations: int,
) -> tuple[Tensor, ViewParameters]:
    """See `semi_fast.ops.draw_views.draw_views`."""
    index = torch.arange(labeled + unlabeled, device=ids.device)
    sources = torch.cat([index, index[labeled:].repeat(strong_views)])
    stream = torch.where(sources < labeled, AUGMENT_LABELED, AUGMENT_UNLABELED)
    strong = strong_views * unlabeled
    view = torch.arange(len(sources), device=ids.device) - labeled  # weak rows 0 .. U - 1, strong_0 from U on
    view = torch.div(view.clamp_min(0), max(unlabeled, 1), rounding_mode="floor")
    key = ViewKey(stream, visits[sources], ids[sources], view)
    mirrored, y, x, _ = words(seed, key, GEOMETRY)
    crop = torch.stack([below(y, 2 * pad + 1), below(x, 2 * pad + 1)], 1)

    key = ViewKey(*(field[len(sources) - strong :] for field in key))
    chosen = [draw_operation(words(seed, key, FIRST_OPERATION + i)) for i in range(operations)]
    empty = torch.zeros(strong, 0, dtype=torch.int64, device=ids.device)
    operation, level, sign = (
        (torch.stack(field, 1) for field in zip(*chosen, strict=True)) if chosen else (empty, empty, empty)
    )
    cut_y, cut_x, _, _ = words(seed, key, CUTOUT)
    corner = [cutout_start(u, side, cutout) for u, side in zip((cut_y, cut_x), resolution, strict=True)]
    parameters = ViewParameters(
        flip=below(mirrored, 2) * int(flip),
        crop=crop,
        operation=operation,
        level=level,
        sign=sign,
        cutout=torch.stack(corner, 1),
    )
    return sources, parameters
