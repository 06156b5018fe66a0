"""The random parameters of a step's views: a pure function of (seed, stream, visit, sample id, view)."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.ops.door import expect, has_kernel
from semi_fast.ops.draw_views import reference
from semi_fast.ops.rand_augment import ViewParameters

__all__ = ["draw_views"]


@torch.no_grad()
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
    """Which of the B + U images each of the N views shows, int64 [N], and what happens to each view.

    `ids` and `visits` are int64 [B + U] in 0..2**32 - 1, labeled rows first. Views come in row order, [labeled | weak |
    strong_0 | ...]; the strong ones, R = S * U, get `operations` operations each. Of `seed` the low 64 bits are the
    key; the counter is (stream, visit, sample id, view << 16 | block), so a row's parameters do not depend on its place
    in the batch. Raises ValueError for a wrong shape, type, device or number.
    """
    device = ids.device
    expect("ids", ids, (labeled + unlabeled,), (torch.int64,), device)
    expect("visits", visits, (labeled + unlabeled,), (torch.int64,), device)
    height, width = resolution
    limits = {
        "labeled": (labeled, 0, None),
        "unlabeled": (unlabeled, 0, None),
        "strong_views": (strong_views, 0, 2**16 - 2),  # a view is 16 bits of the counter, and so is a block
        "resolution": (min(resolution), 1, None),
        "pad": (pad, 0, min(resolution) - 1),
        "cutout": (cutout, 0, None),
        "operations": (operations, 0, 2**16 - 1 - reference.FIRST_OPERATION),
    }
    for name, (value, low, high) in limits.items():
        if value < low or (high is not None and value > high):
            raise ValueError(
                f"{name} must be at least {low}{f' and at most {high}' if high is not None else ''}; got {value}"
            )
    if not has_kernel(device):
        return reference.draw_views(
            ids,
            visits,
            labeled=labeled,
            unlabeled=unlabeled,
            strong_views=strong_views,
            seed=seed,
            resolution=resolution,
            flip=flip,
            pad=pad,
            cutout=cutout,
            operations=operations,
        )
    from semi_fast.ops.draw_views import kernel

    layout = labeled, unlabeled, strong_views
    sources, *parameters = kernel.draw_views(
        ids.contiguous(),
        visits.contiguous(),
        *layout,
        kernel.as_signed(seed),
        height,
        width,
        flip,
        pad,
        cutout,
        operations,
    )
    return sources, ViewParameters(*parameters)
