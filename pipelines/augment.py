"""The views of a step: parameters drawn from (seed, stream, visit, sample id, view), pixels made in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from semi_fast.batch import Rows
from semi_fast.ops.draw_views import draw_views
from semi_fast.ops.rand_augment import ViewParameters, normalise, rand_augment
from semi_fast.schema.data import AugmentConfig


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
        memory_format: torch.memory_format = torch.channels_last,
    ):
        side = min(resolution)
        self.pad = side // 8 if options.pad is None else options.pad
        if not 0 <= self.pad < side:
            raise ValueError(f"augment.pad must lie in 0..{side - 1} for images of {resolution}; got {options.pad}")
        if options.cutout > side:
            raise ValueError(f"augment.cutout must be at most the image side {side}; got {options.cutout}")
        self.options, self.seed, self.resolution, self.dtype = options, seed, resolution, dtype
        self.memory_format = memory_format
        self.mean, self.std = (torch.tensor(v, dtype=torch.float64, device=device) for v in (mean, std))

    def views(self, rows: Rows) -> Tensor:
        """float [N, 3, H, W] in the order [labeled | weak | strong_0 | ...], stored in the memory format, NHWC if not
        said otherwise."""
        sources, parameters = self.draw_all(rows)
        views = rand_augment(
            rows.images,
            sources,
            parameters,
            pad=self.pad,
            cutout=self.options.cutout,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
            zero_padded=rows.layout.labeled if self.options.labeled_padding == "zero" else 0,
        )
        return views.contiguous(memory_format=self.memory_format)  # a convolution follows its input's

    def plain(self, images: Tensor) -> Tensor:
        """Images uint8 [n, H, W, 3] as evaluation sees them: normalised, nothing else."""
        return normalise(images, self.mean, self.std, self.dtype).contiguous(memory_format=self.memory_format)

    def draw(self, rows: Rows) -> ViewParameters:
        """The parameters of every view; a function of the rows' ids and visits, not of their place in the batch."""
        return self.draw_all(rows)[1]

    def sources(self, rows: Rows) -> Tensor:
        """Which of the B + U images each of the N views shows: int64 [N]."""
        return self.draw_all(rows)[0]

    def draw_all(self, rows: Rows) -> tuple[Tensor, ViewParameters]:
        """`sources` and `draw` in one call."""
        return draw_views(
            rows.ids,
            rows.visits,
            labeled=rows.layout.labeled,
            unlabeled=rows.layout.unlabeled,
            strong_views=rows.layout.strong_views,
            seed=self.seed,
            resolution=self.resolution,
            flip=self.options.flip,
            pad=self.pad,
            cutout=self.options.cutout,
            operations=self.options.operations,
        )
