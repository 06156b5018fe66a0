"""Targets, losses and gradient of the embedding alignment in one launch: one program per strong row."""

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
def align_kernel(
    weak_ptr,  # [n, D]
    strong_ptr,  # [R, D]
    center_ptr,  # [D]
    coefficient_ptr,  # [n]
    losses_ptr,  # [R]
    target_ptr,  # [n, D]
    gradient_ptr,  # [R, D]
    rows,
    images,
    width,
    temperature,
    teacher_temperature,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    image = row % images
    d = tl.arange(0, BLOCK_D)
    real = d < width
    coefficient = tl.load(coefficient_ptr + image).to(tl.float32)
    weak = tl.load(weak_ptr + image * width + d, mask=real, other=0.0).to(tl.float32)
    center = tl.load(center_ptr + d, mask=real, other=0.0).to(tl.float32)
    t = tl.where(real, (weak - center) / teacher_temperature, float("-inf"))
    t = tl.exp(t - tl.max(t, 0))
    target = t / tl.sum(t, 0)
    tl.store(target_ptr + image * width + d, target, mask=real & (row < images))
    if coefficient != 0:  # other rows are never read
        z = tl.load(strong_ptr + row * width + d, mask=real, other=0.0).to(tl.float32) / temperature
        z = tl.where(real, z, float("-inf"))
        z = z - tl.max(z, 0)
        e = tl.exp(z)
        total = tl.sum(e, 0)
        loss = -tl.sum(tl.where(real, target * (z - tl.log(total)), 0.0), 0)
        scale = coefficient / rows
        tl.store(losses_ptr + row, scale * loss)
        gradient = scale * (e / total - target) / temperature
        tl.store(gradient_ptr + row * width + d, gradient.to(gradient_ptr.dtype.element_ty), mask=real)
    else:
        tl.store(losses_ptr + row, 0.0)
        zeros = tl.zeros((BLOCK_D,), dtype=gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * width + d, zeros, mask=real)


def launch_options(width: int) -> dict[str, int]:
    """Block sizes: one block holds all features of a row; at most 32 a thread up to 4,096 of them."""
    block = max(32, power_of_two(width))
    return {"BLOCK_D": block, "num_warps": min(8, max(1, block // 512))}


@torch.library.custom_op("semi_fast::embedding_align", mutates_args=())
def embedding_align(
    weak: Tensor,
    strong: Tensor,
    center: Tensor,
    coefficient: Tensor,
    temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(coefficient * H / R, float32 [R]; target, float32 [n, D]; gradient in `strong`); contiguous tensors, R > 0."""
    outputs = empty_outputs(weak, strong)
    rows, width = strong.shape
    align_kernel[(rows,)](
        weak,
        strong,
        center,
        coefficient,
        *outputs,
        rows,
        len(weak),
        width,
        temperature,
        teacher_temperature,
        **launch_options(width),
    )
    return outputs


@embedding_align.register_fake
def empty_outputs(weak: Tensor, strong: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    losses = torch.empty(len(strong), dtype=torch.float32, device=strong.device)
    return losses, torch.empty(weak.shape, dtype=torch.float32, device=weak.device), torch.empty_like(strong)


def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    scaled = None if upstream is None else gradient * upstream.unsqueeze(1).to(gradient.dtype)
    return None, scaled, None, None, None, None


embedding_align.register_autograd(backward, setup_context=keep_gradient)
