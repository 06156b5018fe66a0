"""What several processes must agree on; every function is the identity in a run of one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""By bytes of an element, the integers that its bits are read as: their product with a place fits into 64 bits."""
AT_ONCE = 2**22
"""Integers that a checksum multiplies at a time, which bounds its memory."""


def count() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def lost_ones_named() -> Iterator[None]:
    """Say in one line what an exchange that failed means: RuntimeError that another process was lost."""
    try:
        yield
    except RuntimeError as error:
        if count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RuntimeError(
                "another process of this run has ended, or did not answer within engine.timeout_seconds; its own "
                "message says why: --resume=auto goes on from the newest checkpoint"
            ) from error
        raise


@contextmanager
def all_or_none() -> Iterator[None]:
    """What one process cannot do, none does: the first one's expected error is raised on all, its own first."""
    mine: Exception | None = None
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        mine = error
    errors = [mine] * count()
    if count() > 1:
        dist.all_gather_object(errors, mine)
    for error in (mine, *errors):
        if error is not None:
            raise error


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


def checksum(tensor: Tensor) -> Tensor:
    """int64 scalar: the sum over a tensor's bits, read as integers, of integer times place.

    It is another one if one of them changes, or two change places.
    """
    bits = tensor.detach().flatten().view(BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), AT_ONCE):
        part = bits[start : start + AT_ONCE]
        total += (part * torch.arange(start + 1, start + 1 + len(part), device=bits.device)).sum()
    return total


def differing(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those whose bits are not the same on all processes, by one exchange; waits for the device."""
    if count() == 1:
        return []
    names, held = zip(*tensors, strict=True)
    own = torch.stack([checksum(tensor) for tensor in held])
    least, least_inverse = least_in_place(torch.stack([own, ~own]))  # ~ reverses the order, and no value overflows
    return [name for name, same in zip(names, (least == ~least_inverse).tolist(), strict=True) if not same]
