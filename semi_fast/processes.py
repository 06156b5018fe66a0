"""What several processes must agree on; every function is the identity in a run of one process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def count() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in one exchange."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    pieces = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients, strict=True)])


def gather_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate every tensor's rows over the processes, in their order, which is that of a single process."""
    if count() == 1:
        return tensors
    gathered = {}
    for name, tensor in tensors.items():
        sent = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).contiguous()
        parts = [torch.empty_like(sent) for _ in range(count())]
        dist.all_gather(parts, sent)
        gathered[name] = torch.cat(parts).to(tensor.dtype)
    return gathered


def sum_in_place(tensor: Tensor) -> Tensor:
    """The sum over processes."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def sums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor's sum over processes."""
    return {name: sum_in_place(tensor.contiguous()) for name, tensor in tensors.items()}


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with that of the first process."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def least_in_place(tensor: Tensor) -> Tensor:
    """The elementwise minimum over processes."""
    if count() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor
