"""The bank's insertion in one launch: the program of a class ranks rows and slots, exchanges them and keeps the sum."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton gives its launcher no types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semi_fast.ops.door import power_of_two


@triton.jit
def push_kernel(
    features_ptr,  # [C, M, D]
    confidences_ptr,  # [C, M]
    inserted_ptr,  # [C, M]
    sums_ptr,  # [C, D]
    new_features_ptr,  # [R, D]
    new_labels_ptr,  # [R], as are the rest
    new_confidences_ptr,
    mask_ptr,
    number_ptr,
    classes,
    slots,
    width,
    rows,
    OLDEST_LEAVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    real = row < rows
    label = tl.load(new_labels_ptr + row, mask=real, other=0)
    confidence = tl.load(new_confidences_ptr + row, mask=real, other=0.0).to(confidences_ptr.dtype.element_ty)
    offered = real & (tl.minimum(tl.maximum(label, 0), classes - 1) == k) & (confidence > 0)  # false for NaN too
    offered = offered & (tl.load(mask_ptr + row, mask=real, other=0) != 0)
    if tl.sum(offered.to(tl.int32), 0) > 0:
        slot = tl.arange(0, BLOCK_M)
        stored = tl.load(confidences_ptr + k * slots + slot, mask=slot < slots, other=0.0)
        age = tl.load(inserted_ptr + k * slots + slot, mask=slot < slots, other=0)
        if OLDEST_LEAVES:  # the priority of a row is its age
            priority = age
            new_priority = tl.load(number_ptr + row, mask=real, other=0)
        else:
            priority = stored
            new_priority = confidence

        # The rank of a row among the offered rows of its class: by how many it is beaten.
        rank = tl.zeros((BLOCK_R,), dtype=tl.int32)
        for start in range(0, rows, CHUNK):
            other = start + tl.arange(0, CHUNK)
            there = other < rows
            their_label = tl.load(new_labels_ptr + other, mask=there, other=0)
            theirs = tl.load(new_confidences_ptr + other, mask=there, other=0.0).to(confidences_ptr.dtype.element_ty)
            rival = there & (tl.minimum(tl.maximum(their_label, 0), classes - 1) == k) & (theirs > 0)
            rival = rival & (tl.load(mask_ptr + other, mask=there, other=0) != 0)
            if OLDEST_LEAVES:
                theirs = tl.load(number_ptr + other, mask=there, other=0)
            tie = (theirs[None, :] == new_priority[:, None]) & (other[None, :] < row[:, None])
            ahead = (theirs[None, :] > new_priority[:, None]) | tie
            rank += tl.sum((ahead & rival[None, :]).to(tl.int32), 1)
        rank = tl.where(offered, rank, -1)

        for start in range(0, slots, CHUNK):  # nothing of the bank is read again below but what this chunk replaces
            mine = start + tl.arange(0, CHUNK)
            here = mine < slots
            at = k * slots + mine
            my_confidence = tl.load(confidences_ptr + at, mask=here, other=0.0)
            my_age = tl.load(inserted_ptr + at, mask=here, other=0)
            my_priority = my_age if OLDEST_LEAVES else my_confidence
            # How many slots are worse than each of this chunk: it meets the row of that rank.
            empty_before = (age[None, :] == my_age[:, None]) & (slot[None, :] < mine[:, None])
            later = (age[None, :] > my_age[:, None]) | empty_before
            worse = (priority[None, :] < my_priority[:, None]) | ((priority[None, :] == my_priority[:, None]) & later)
            meets = tl.sum((worse & (slot < slots)[None, :]).to(tl.int32), 1)  # [CHUNK], a rank
            source = tl.sum(tl.where(rank[None, :] == meets[:, None], row[None, :] + 1, 0), 1) - 1  # -1: no such row
            found = here & (source >= 0)
            number = tl.load(number_ptr + source, mask=found, other=0)
            entering = tl.load(new_confidences_ptr + source, mask=found, other=0.0).to(my_confidence.dtype)
            enters = found & ((number if OLDEST_LEAVES else entering) > my_priority)
            if tl.sum(enters.to(tl.int32), 0) > 0:
                tl.debug_barrier()  # all warps have read what is now replaced
                tl.store(confidences_ptr + at, entering, mask=enters)
                tl.store(inserted_ptr + at, number, mask=enters)
                for column in range(0, width, BLOCK_D):
                    d = column + tl.arange(0, BLOCK_D)
                    moved = enters[:, None] & (d < width)[None, :]
                    old_ptr = features_ptr + at[:, None] * width + d[None, :]
                    old = tl.load(old_ptr, mask=moved, other=0.0)
                    new_ptr = new_features_ptr + source.to(tl.int64)[:, None] * width + d[None, :]
                    new = tl.load(new_ptr, mask=moved, other=0.0).to(old.dtype)
                    tl.store(old_ptr, new, mask=moved)
                    change = tl.sum(new.to(tl.float64) - old.to(tl.float64), 0)
                    total = tl.load(sums_ptr + k * width + d, mask=d < width, other=0.0)
                    tl.store(sums_ptr + k * width + d, total + change, mask=d < width)


def launch_options(slots: int, rows: int, width: int) -> dict[str, int]:
    """Block sizes for a bank of so many slots per class: tiles of at most 64 entries a thread."""
    block_m, block_r = max(16, power_of_two(slots)), max(16, power_of_two(rows))
    warps = 4 if max(block_m, block_r) <= 256 else 8
    return {
        "BLOCK_M": block_m,
        "BLOCK_R": block_r,
        "BLOCK_D": min(64, max(16, power_of_two(width))),
        "CHUNK": min(32, max(2, warps * 32 * 32 // max(block_m, block_r))),
        "num_warps": warps,
    }


@torch.library.custom_op("semi_fast::bank_push", mutates_args=("features", "confidences", "inserted", "sums"))
def bank_push(
    features: Tensor,
    confidences: Tensor,
    inserted: Tensor,
    sums: Tensor,
    new_features: Tensor,
    new_labels: Tensor,
    new_confidences: Tensor,
    mask: Tensor,
    number: Tensor,
    oldest_leaves: bool,
) -> None:
    """See `semi_fast.ops.bank_push.bank_push`; every tensor contiguous, at least one row."""
    classes, slots, width = features.shape
    tensors = features, confidences, inserted, sums, new_features, new_labels, new_confidences, mask, number
    rows = len(new_labels)
    options = launch_options(slots, rows, width)
    push_kernel[(classes,)](*tensors, classes, slots, width, rows, OLDEST_LEAVES=oldest_leaves, **options)
