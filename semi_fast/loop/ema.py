"""The average of a model's weights over the steps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second model: parameters are averaged, buffers (batch-normalisation statistics) are copied."""

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.averaged: list[Tensor] = list(self.model.parameters())
        self.current: list[Tensor] = list(model.parameters())
        self.buffers = list(self.model.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """average += weight * (current - average), in place; `weight` is a scalar tensor of their type. Never waits."""
        change = torch._foreach_sub(self.current, self.averaged)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(self.averaged, change)
        if self.buffers[0]:
            torch._foreach_copy_(*self.buffers)
