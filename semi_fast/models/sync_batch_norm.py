"""Batch normalisation over the rows of all processes, on any backend, so that N processes equal one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AllReduceSum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics in training are those of the global batch; every process has as many rows."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = AllReduceSum.apply(x.sum((0, 2, 3))) / count  # [channels]
        centred = x - mean.view(1, -1, 1, 1)
        var = AllReduceSum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1)).to(input.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Turn every nn.BatchNorm2d of `model` into a `SyncBatchNorm2d`, in place, parameters and buffers kept.

    Raises ValueError if the model has batch normalisation of another kind.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model.bn=sync knows nn.BatchNorm2d; this model has {type(module).__name__}: use --model.bn=local, "
                "whose statistics are each process's own"
            )
