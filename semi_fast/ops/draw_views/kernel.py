"""The drawing in one launch: a lane draws all words of one view."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton gives its launcher no types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from semi_fast.ops.draw_views import reference
from semi_fast.ops.rand_augment import IDENTITY, OPERATIONS
from semi_fast.philox import AUGMENT_LABELED, AUGMENT_UNLABELED

GEOMETRY, CUTOUT = tl.constexpr(reference.GEOMETRY), tl.constexpr(reference.CUTOUT)
FIRST_OPERATION, LEVELS = tl.constexpr(reference.FIRST_OPERATION), tl.constexpr(reference.LEVELS)
LABELED, UNLABELED = tl.constexpr(AUGMENT_LABELED), tl.constexpr(AUGMENT_UNLABELED)
KINDS, NOTHING = tl.constexpr(len(OPERATIONS)), tl.constexpr(IDENTITY)
BLOCK = 128


@triton.jit
def below(word, n):
    """A word as an integer in [0, n)."""
    return ((word.to(tl.uint64) * n) >> 32).to(tl.int64)


@triton.jit(do_not_specialize=("seed",))
def draw_kernel(
    ids_ptr,  # [B + U]
    visits_ptr,  # [B + U]
    sources_ptr,  # [N]
    flip_ptr,  # [N]
    crop_ptr,  # [N, 2]
    operation_ptr,  # [R, operations], as are level and sign
    level_ptr,
    sign_ptr,
    cutout_ptr,  # [R, 2]
    seed,
    views,
    labeled,
    unlabeled,
    height,
    width,
    flip,
    pad,
    cutout,
    operations,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = n < views
    view = tl.maximum(n - labeled, 0) // tl.maximum(unlabeled, 1)
    source = n - view * unlabeled
    tl.store(sources_ptr + n, source.to(tl.int64), mask=real)
    stream = tl.where(n < labeled, LABELED, UNLABELED).to(tl.uint32)
    visit = tl.load(visits_ptr + source, mask=real, other=0).to(tl.uint32)
    sample = tl.load(ids_ptr + source, mask=real, other=0).to(tl.uint32)
    first = view << 16

    mirrored, y, x, _ = tl.philox(seed, stream, visit, sample, first | GEOMETRY)
    tl.store(flip_ptr + n, below(mirrored, 2) * flip, mask=real)
    tl.store(crop_ptr + n * 2, below(y, 2 * pad + 1), mask=real)
    tl.store(crop_ptr + n * 2 + 1, below(x, 2 * pad + 1), mask=real)

    r = n - labeled - unlabeled
    strong = real & (r >= 0)
    y, x, _, _ = tl.philox(seed, stream, visit, sample, first | CUTOUT)
    # floor(max(0, centre - cutout / 2)); a shift rounds down
    tl.store(cutout_ptr + r * 2, tl.maximum((below(y, 2 * height) - cutout) >> 1, 0), mask=strong)
    tl.store(cutout_ptr + r * 2 + 1, tl.maximum((below(x, 2 * width) - cutout) >> 1, 0), mask=strong)
    for i in range(operations):
        which, level, happens, sign = tl.philox(seed, stream, visit, sample, first | (FIRST_OPERATION + i))
        at = r * operations + i
        tl.store(operation_ptr + at, tl.where(below(happens, 2) == 1, below(which, KINDS), NOTHING), mask=strong)
        tl.store(level_ptr + at, 1 + below(level, LEVELS), mask=strong)
        tl.store(sign_ptr + at, 2 * below(sign, 2) - 1, mask=strong)


def as_signed(seed: int) -> int:
    """The low 64 bits of a seed as a signed number, which is what a custom operation takes."""
    return (seed + 2**63) % 2**64 - 2**63


def make_outputs(ids: Tensor, rows: int, strong: int, operations: int) -> tuple[Tensor, ...]:
    """sources, flip, crop, operation, level, sign, cutout; to be filled."""
    shapes = (rows,), (rows,), (rows, 2), *((strong, operations),) * 3, (strong, 2)
    return tuple(ids.new_empty(shape) for shape in shapes)


@torch.library.custom_op("semi_fast::draw_views", mutates_args=())
def draw_views(
    ids: Tensor,
    visits: Tensor,
    labeled: int,
    unlabeled: int,
    strong_views: int,
    seed: int,
    height: int,
    width: int,
    flip: bool,
    pad: int,
    cutout: int,
    operations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sources, then the fields of ViewParameters: see `semi_fast.ops.draw_views.draw_views`; seed as `as_signed`."""
    strong = strong_views * unlabeled
    views = labeled + unlabeled + strong
    outputs = make_outputs(ids, views, strong, operations)
    if views:
        scalars = seed, views, labeled, unlabeled, height, width, int(flip), pad, cutout, operations
        draw_kernel[(triton.cdiv(views, BLOCK),)](ids, visits, *outputs, *scalars, BLOCK=BLOCK, num_warps=4)
    return outputs  # type: ignore[return-value]


@draw_views.register_fake
def _(
    ids: Tensor,
    visits: Tensor,
    labeled: int,
    unlabeled: int,
    strong_views: int,
    seed: int,
    height: int,
    width: int,
    flip: bool,
    pad: int,
    cutout: int,
    operations: int,
) -> tuple[Tensor, ...]:
    return make_outputs(ids, labeled + unlabeled + strong_views * unlabeled, strong_views * unlabeled, operations)
