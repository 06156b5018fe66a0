"""SeMi's pseudo-labels in one launch: one program per image, distances by direct differences, all in float32."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton gives its launcher no types)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from semi_fast.ops.door import power_of_two


@triton.jit
def row_softmax(z, real):
    """softmax of a row; entries that are not real get 0."""
    e = tl.where(real, tl.exp(z - tl.max(tl.where(real, z, float("-inf")), 0)), 0.0)
    return e / tl.sum(e, 0)


@triton.jit
def highest(x, real):
    """(largest entry of a row, its place, the first of equals); a NaN counts for nothing: a row of them gives -1, 0."""
    known = tl.where(real & (x == x), x, -1.0)
    return tl.max(known, 0), tl.argmax(known, 0)


@triton.jit
def pseudo_label_kernel(
    logits_ptr,  # [U, C]
    balanced_logits_ptr,  # [U, C]
    queries_ptr,  # [U, D]
    prototypes_ptr,  # [C, D]
    valid_ptr,  # [C]
    mixing_ptr,  # [C]
    adjustment_ptr,  # [C]
    hardness_scale_ptr,  # scalar
    label_ptr,  # [U], as are the next five
    confidence_ptr,
    mask_ptr,
    hardness_ptr,
    adjusted_label_ptr,
    adjusted_mask_ptr,
    probs_ptr,  # [U, C]
    counts_ptr,  # [C]
    classes,
    width,
    threshold,
    prototype_temperature,
    log_classes,
    RENORMALIZE: tl.constexpr,
    OR_MIXED_MASK: tl.constexpr,
    MIXED_ENTROPY: tl.constexpr,
    OR_BALANCED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    real = k < classes
    z = tl.load(logits_ptr + row * classes + k, mask=real, other=0.0).to(tl.float32)
    adjustment = tl.load(adjustment_ptr + k, mask=real, other=0.0).to(tl.float32)
    valid = real & (tl.load(valid_ptr + k, mask=real, other=0) != 0)
    weight = tl.where(valid, tl.load(mixing_ptr + k, mask=real, other=0.0).to(tl.float32), 0.0)
    probs = row_softmax(z, real)
    linear_confidence, _ = highest(probs, real)

    squared = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        query = tl.load(queries_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        prototype_ptr = prototypes_ptr + k.to(tl.int64)[:, None] * width + d[None, :]
        inside = valid[:, None] & (d < width)[None, :]
        prototype = tl.load(prototype_ptr, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, query[None, :] - prototype, 0.0)
        squared += tl.sum(difference * difference, 1)
    any_valid = tl.sum(valid.to(tl.int32), 0) > 0
    vote = row_softmax(tl.where(any_valid, -tl.sqrt(squared) / prototype_temperature, 0.0), valid | ~any_valid)
    vote = tl.where(valid, vote, 0.0)
    mixed = (1 - weight) * probs + weight * vote
    if RENORMALIZE:
        some = tl.sum((real & (weight > 0)).to(tl.int32), 0) > 0
        mixed = tl.where(some, mixed / tl.sum(tl.where(real, mixed, 0.0), 0), mixed)
    tl.store(probs_ptr + row * classes + k, mixed, mask=real)

    confidence, label = highest(mixed, real)
    mask = (linear_confidence >= threshold) | ((confidence >= threshold) & OR_MIXED_MASK)
    p = mixed if MIXED_ENTROPY else probs
    p = tl.minimum(tl.maximum(p, 1e-8), 1.0 - 1e-8)
    entropy = -tl.sum(tl.where(real, p * tl.log(p), 0.0), 0) / log_classes
    scale = tl.load(hardness_scale_ptr).to(tl.float32)
    tl.store(label_ptr + row, label.to(tl.int64))
    tl.store(confidence_ptr + row, confidence)
    tl.store(mask_ptr + row, mask)
    tl.store(hardness_ptr + row, 1 - scale + scale * entropy)
    tl.atomic_add(counts_ptr + label, 1, mask=mask)  # whole numbers: their order does not matter

    adjusted_confidence, adjusted_label = highest(row_softmax(z - adjustment, real), real)
    own = tl.load(balanced_logits_ptr + row * classes + k, mask=real, other=0.0).to(tl.float32)
    if OR_BALANCED:
        own_confidence, _ = highest(row_softmax(own, real), real)
        adjusted_mask = (adjusted_confidence >= threshold) | (own_confidence >= threshold)
    else:
        own_confidence, _ = highest(row_softmax(own - adjustment, real), real)
        adjusted_mask = own_confidence >= threshold
    tl.store(adjusted_label_ptr + row, adjusted_label.to(tl.int64))
    tl.store(adjusted_mask_ptr + row, adjusted_mask)


def launch_options(classes: int, width: int) -> dict[str, int]:
    """Block sizes: one block holds all classes; at most 8 of them and 32 differences a thread at a time."""
    block_c = max(16, power_of_two(classes))
    block_d = min(128, max(16, power_of_two(width)), max(4, 4096 // block_c))
    return {"BLOCK_C": block_c, "BLOCK_D": block_d, "num_warps": 4 if block_c <= 1024 else 8}


@torch.library.custom_op("semi_fast::pseudo_label", mutates_args=())
def pseudo_label(
    logits: Tensor,
    balanced_logits: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    valid: Tensor,
    mixing: Tensor,
    adjustment: Tensor,
    hardness_scale: Tensor,
    threshold: float,
    prototype_temperature: float,
    renormalize: bool,
    mask_source: str,
    entropy_source: str,
    balanced_mask: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `semi_fast.ops.pseudo_label.pseudo_label`; every tensor contiguous."""
    outputs = empty_outputs(logits)
    inputs = logits, balanced_logits, queries, prototypes, valid, mixing, adjustment, hardness_scale
    rows, classes = logits.shape
    if rows:
        pseudo_label_kernel[(rows,)](
            *inputs,
            *outputs,
            classes,
            queries.shape[1],
            threshold,
            prototype_temperature,
            math.log(classes),
            RENORMALIZE=renormalize,
            OR_MIXED_MASK=mask_source == "or",
            MIXED_ENTROPY=entropy_source == "mixed",
            OR_BALANCED=balanced_mask == "or",
            **launch_options(classes, queries.shape[1]),
        )
    return outputs


@pseudo_label.register_fake
def empty_outputs(logits: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs' memory; only the counts have a value yet."""
    rows, classes = logits.shape

    def row(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, dtype=dtype, device=logits.device)

    return (
        row(torch.int64),
        row(torch.float32),
        row(torch.bool),
        row(torch.float32),
        row(torch.int64),
        row(torch.bool),
        torch.empty(rows, classes, dtype=torch.float32, device=logits.device),
        torch.zeros(classes, dtype=torch.int64, device=logits.device),
    )
