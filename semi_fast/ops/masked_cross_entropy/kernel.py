"""Losses and gradient of the masked cross-entropy in one launch; what is left to backward is a multiplication."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton gives its launcher no types)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from semi_fast.ops.door import power_of_two


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # [R, C]
    target_ptr,  # [n] or [n, C]
    coefficient_ptr,  # [n]
    offset_ptr,  # [C]
    losses_ptr,  # [R]
    gradient_ptr,  # [R, C]
    rows,
    images,
    classes,
    SOFT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_C)
    image = row % images
    if WEIGHTED:
        coefficient = tl.load(coefficient_ptr + image, mask=row < rows, other=0.0).to(tl.float32)
    else:
        coefficient = (row < rows).to(tl.float32)
    kept = coefficient != 0
    here = (row < rows)[:, None] & (k < classes)[None, :]
    read = here & kept[:, None]
    at = row[:, None] * classes + k[None, :]
    z = tl.load(logits_ptr + at, mask=read, other=0.0).to(tl.float32)  # rows that do not count are never read
    if OFFSET:
        z += tl.load(offset_ptr + k, mask=k < classes, other=0.0).to(tl.float32)[None, :]
    z = tl.where((k < classes)[None, :], z, float("-inf"))
    z = z - tl.max(z, 1)[:, None]
    e = tl.exp(z)
    total = tl.sum(e, 1)
    log_probs = z - tl.log(total)[:, None]
    if SOFT:
        target = tl.load(target_ptr + image[:, None] * classes + k[None, :], mask=read, other=0.0).to(tl.float32)
    else:
        label = tl.load(target_ptr + image, mask=row < rows, other=0)
        target = (label[:, None] == k[None, :]).to(tl.float32)
    losses = -tl.sum(tl.where(target != 0, target * log_probs, 0.0), 1)
    gradient = tl.sum(target, 1)[:, None] * e / total[:, None] - target
    scale = coefficient / rows
    tl.store(losses_ptr + row, tl.where(kept, scale * losses, 0.0), mask=row < rows)
    gradient = tl.where(kept[:, None], scale[:, None] * gradient, 0.0)
    tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=here)


def launch_options(classes: int) -> dict[str, int]:
    """Block sizes: one block holds all classes; at most 16 entries a thread."""
    block_c = max(16, power_of_two(classes))
    return {"BLOCK_C": block_c, "BLOCK_R": max(1, min(16, 2048 // block_c)), "num_warps": 4}


@torch.library.custom_op("semi_fast::masked_cross_entropy", mutates_args=())
def masked_cross_entropy(
    logits: Tensor, target: Tensor, coefficient: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(coefficient * CE / R, float32 [R]; its gradient in the logits, [R, C]); contiguous tensors, R > 0."""
    losses, gradient = empty_outputs(logits)
    rows, classes = logits.shape
    options = launch_options(classes)
    cross_entropy_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        logits,
        target,
        logits if coefficient is None else coefficient,
        logits if offset is None else offset,
        losses,
        gradient,
        rows,
        len(target),
        classes,
        SOFT=target.ndim == 2,
        WEIGHTED=coefficient is not None,
        OFFSET=offset is not None,
        **options,
    )
    return losses, gradient


@masked_cross_entropy.register_fake
def empty_outputs(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device), torch.empty_like(logits)


def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None]:
    (gradient,) = ctx.saved_tensors
    scaled = None if upstream is None else gradient * upstream.unsqueeze(1).to(gradient.dtype)
    return scaled, None, None, None


masked_cross_entropy.register_autograd(backward, setup_context=keep_gradient)
