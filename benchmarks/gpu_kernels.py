"""Every operation as it runs on the device against its reference: views and bank exactly, losses within rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_rows import Row, Setting, checked, failed
from semi_fast.ops.bank_push import bank_push
from semi_fast.ops.bank_push import reference as bank_reference
from semi_fast.ops.draw_views import draw_views
from semi_fast.ops.draw_views import reference as draw_reference
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.embedding_align import reference as align_reference
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.masked_cross_entropy import reference as entropy_reference
from semi_fast.ops.pseudo_label import PseudoLabels, pseudo_label
from semi_fast.ops.pseudo_label import reference as label_reference
from semi_fast.ops.rand_augment import rand_augment
from semi_fast.ops.rand_augment import reference as augment_reference

Check = Callable[[torch.device, Callable[..., Any]], Iterator[Row]]

LAYOUTS = ((64, 64, 2), (1, 0, 0), (0, 1, 1), (3, 7, 0), (64, 128, 2))
SIDES = ((32, 32), (64, 64), (17, 23), (2, 5))
BANKS = ((10, 128, 128, 128), (3, 4, 5, 7), (127, 64, 32, 256), (2, 130, 3, 128), (4, 1, 3, 1))
"""Classes, slots, width, rows."""
LABELS = ((64, 10, 128), (1, 2, 5), (6, 127, 70), (64, 127, 2048))
"""Rows, classes, width."""
LOSSES = ((128, 64, 10), (1, 1, 2), (6, 3, 100), (256, 128, 127), (6, 6, 1000))
"""Rows, images, classes or width."""
VALUE = 1e-5
ROUNDING = {torch.float32: 5e-5, torch.bfloat16: 3 * 2**-8}
"""Of a loss and of a gradient. In float32 it is that of exponentials of up to 400 by a GPU's approximate instruction;
a bfloat16 gradient is rounded when it is made, and times the upstream gradient."""
CLEAR = 3e-4  # between the two most probable classes, or of the threshold: else the choice is rounding's


def check_draw_views(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    for labeled, unlabeled, strong_views in LAYOUTS:
        ids, visits = (torch.randint(2**32, (labeled + unlabeled,), generator=generator) for _ in range(2))
        options: dict[str, Any] = {"labeled": labeled, "unlabeled": unlabeled, "strong_views": strong_views}
        options |= {"resolution": (32, 40), "flip": True, "pad": 4, "cutout": 15, "operations": 2}
        wrong = 0
        for seed in (0, 2**32 - 1, 2**64 - 1):
            sources, drawn = op(ids.to(device), visits.to(device), seed=seed, **options)
            expected_sources, expected = draw_reference.draw_views(ids, visits, seed=seed, **options)
            wrong += differing([sources, *drawn], [expected_sources, *expected])
        yield exact(f"draw_views {labeled}+{unlabeled}x{1 + strong_views}", wrong)


def check_rand_augment(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.tensor([0.49, 0.48, 0.45], dtype=torch.float64), torch.tensor([0.25, 0.24, 0.26]).double()
    for height, width in SIDES:
        images = torch.randint(256, (96, height, width, 3), dtype=torch.uint8, generator=generator)
        images[0], images[1] = 93, torch.where(images[1] < 80, 17, 203).to(torch.uint8)  # flat, and two values
        ids, side = torch.arange(96), min(height, width)
        sources, parameters = draw_reference.draw_views(
            ids, ids, labeled=0, unlabeled=96, strong_views=2, seed=5, resolution=(height, width),
            flip=True, pad=side // 8, cutout=side // 2, operations=2,
        )  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16) if side == SIDES[0][0] else (torch.float32,):
            options: dict[str, Any] = {"pad": side // 8, "cutout": side // 2, "dtype": dtype, "zero_padded": 3}
            expected = augment_reference.rand_augment(images, sources, parameters, mean=mean, std=std, **options)
            moved = type(parameters)(*(field.to(device) for field in parameters))
            tensors = images.to(device), sources.to(device), moved
            found = op(*tensors, mean=mean.to(device), std=std.to(device), **options)
            yield exact(f"rand_augment {height}x{width} {name_of(dtype)}", differing([found], [expected]))


def check_bank_push(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    for classes, slots, width, rows in BANKS:
        generator = torch.Generator().manual_seed(classes)
        for oldest_leaves in (False, True) if classes == BANKS[0][0] else (False,):
            start = (
                torch.zeros(classes, slots, width),
                torch.zeros(classes, slots),
                torch.full((classes, slots), -1),
                torch.zeros(classes, width, dtype=torch.float64),
            )
            ours, expected = [x.to(device) for x in start], [x.clone() for x in start]
            reference: Callable[..., None] = bank_reference.bank_push
            for push in range(6):
                confidences = torch.randint(-1, 6, (rows,), generator=generator) / 5  # ties are the rule
                offered = (
                    torch.randn(rows, width, generator=generator),
                    torch.randint(classes, (rows,), generator=generator),
                    torch.where(torch.rand(rows, generator=generator) < 0.1, torch.nan, confidences),
                    torch.rand(rows, generator=generator) < 0.9,
                    push * rows + torch.arange(rows),
                )
                op(*ours, *(x.to(device) for x in offered), oldest_leaves=oldest_leaves)
                reference(*expected, *offered, oldest_leaves=oldest_leaves)
                for bank in (ours, expected):
                    bank[1] *= 0.99
            rule = "oldest" if oldest_leaves else "lowest"
            name = f"bank_push C={classes} M={slots} D={width} R={rows} {rule} leaves"
            yield exact(name, differing(ours[:3], expected[:3]))
            error = float((ours[3].cpu() - expected[3]).abs().max())
            yield checked(f"{name}, sums", error, "largest difference", "<= 1e-10", error <= 1e-10)


def check_pseudo_label(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    for rows, classes, width in LABELS:
        generator = torch.Generator().manual_seed(rows * classes)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def uniform(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.rand(*shape, generator=generator)

        inputs = [
            4 * normal(rows, classes), 4 * normal(rows, classes), 0.3 * normal(rows, width),
            0.3 * normal(classes, width), uniform(classes) > 0.3, 0.4 * uniform(classes), 0.1 * uniform(classes),
            normal(classes), torch.tensor(0.75),
        ]  # fmt: skip
        options: dict[str, Any] = {"threshold": 0.5, "temperature": 1.3, "prototype_temperature": 2.0}
        modes = {"by_predicted": False, "renormalize": True, "mask_source": "or", "entropy_source": "mixed"}
        options |= modes | {"balanced_mask": "or"}
        double = [x if x.dtype == torch.bool else x.double() for x in inputs]
        expected = label_reference.pseudo_label(*double, **options)
        on_device = op(*(x.to(device) for x in inputs), **options)
        found, expected = PseudoLabels(*(x.cpu() for x in on_device)), PseudoLabels(*expected)
        top = expected.probs.topk(2, 1).values
        clear = ((top[:, 0] - top[:, 1]) > CLEAR) & ((expected.confidence - 0.5).abs() > CLEAR)
        name = f"pseudo_label U={rows} C={classes} D={width}"
        floats = [(getattr(found, x), getattr(expected, x)) for x in ("confidence", "hardness", "probs")]
        error = max(scaled_error(mine, theirs, 1e-5, 1e-6) for mine, theirs in floats)
        yield checked(name, error, "of 1e-5 relative + 1e-6", "<= 1", error <= 1)
        chosen = ("label", "mask", "adjusted_label", "adjusted_mask")
        mine, theirs = ([getattr(x, field)[clear] for field in chosen] for x in (found, expected))
        yield exact(f"{name}, labels and masks", differing(mine, theirs))


def check_masked_cross_entropy(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    for rows, images, classes in LOSSES:
        for dtype in types_of(rows):
            generator = torch.Generator().manual_seed(classes)
            logits = (5 * torch.randn(rows, classes, generator=generator)).to(dtype)
            target = torch.randint(classes, (images,), generator=generator)
            coefficient, offset = torch.rand(images, generator=generator), torch.randn(classes, generator=generator)
            if images > 1:
                coefficient[-1] = 0
                logits[images - 1] = torch.nan  # a row that does not count is never read
            ours, exactly = logits.to(device).requires_grad_(), logits.double().requires_grad_()
            loss = op(ours, *(x.to(device) for x in (target, coefficient, offset)))
            expected = entropy_reference.masked_cross_entropy(exactly, target, coefficient, offset.double())
            name = f"masked_cross_entropy R={rows} n={images} C={classes} {name_of(dtype)}"
            yield loss_row(name, loss, expected, (ours, exactly), dtype, 3 / rows)


def check_embedding_align(device: torch.device, op: Callable[..., Any]) -> Iterator[Row]:
    temperatures = {"temperature": 0.09, "teacher_temperature": 0.018}
    for rows, images, width in (*LOSSES, (128, 64, 2048)):
        for dtype in types_of(rows):
            generator = torch.Generator().manual_seed(width)
            weak, strong = (torch.randn(n, width, generator=generator).to(dtype) for n in (images, rows))
            coefficient, center = torch.rand(images, generator=generator), torch.full((width,), 0.01)
            ours, exactly = strong.to(device).requires_grad_(), strong.double().requires_grad_()
            loss, _ = op(weak.to(device), ours, center.to(device), coefficient.to(device), **temperatures)
            double = weak.double(), exactly, center.double(), coefficient.double()
            expected, _ = align_reference.embedding_align(*double, **temperatures)
            name = f"embedding_align n={images} R={rows} D={width} {name_of(dtype)}"
            yield loss_row(name, loss, expected, (ours, exactly), dtype, 3 / rows / 0.09)


def types_of(rows: int) -> list[torch.dtype]:
    """A compiler takes a second for each: the shapes that training has get both."""
    return [*ROUNDING] if rows >= 128 else [torch.float32]


def loss_row(
    name: str, loss: Tensor, expected: Tensor, leaves: tuple[Tensor, Tensor], dtype: torch.dtype, unit: float
) -> Row:
    """Value and gradient; a gradient is a difference of two terms of size `unit`: what float32 loses is absolute."""
    value = scaled_error(loss, expected, VALUE, 1e-7)
    (mine,), (theirs,) = (torch.autograd.grad(3 * x, leaf) for x, leaf in zip((loss, expected), leaves, strict=True))
    error = max(value, scaled_error(mine, theirs, ROUNDING[dtype], 1e-6 * unit))
    return checked(name, error, "of the rounding", "<= 1", error <= 1, note="value and gradient against float64")


def scaled_error(found: Tensor, expected: Tensor, relative: float, absolute: float) -> float:
    """The largest difference, in units of what is allowed; NaN counts as no number can."""
    expected = expected.detach().double().cpu()
    error = (found.detach().double().cpu() - expected).abs() / (relative * expected.abs() + absolute)
    return float(error.nan_to_num(nan=1e9).max())


def differing(found: list[Tensor], expected: list[Tensor]) -> int:
    """Elements that are not equal; all of a tensor of another shape or type."""
    wrong = 0
    for mine, theirs in zip(found, expected, strict=True):
        same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
        wrong += int((mine.cpu() != theirs.cpu()).sum()) if same else theirs.numel()
    return wrong


def exact(name: str, wrong: int) -> Row:
    return checked(name, wrong, "elements differ", "none", wrong == 0)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


OPERATIONS: dict[str, tuple[Check, Callable[..., Any]]] = {
    "draw_views": (check_draw_views, draw_views),
    "rand_augment": (check_rand_augment, rand_augment),
    "bank_push": (check_bank_push, bank_push),
    "pseudo_label": (check_pseudo_label, pseudo_label),
    "masked_cross_entropy": (check_masked_cross_entropy, masked_cross_entropy),
    "embedding_align": (check_embedding_align, embedding_align),
}


def kernels(setting: Setting, operations: Mapping[str, tuple[Check, Callable[..., Any]]] = OPERATIONS) -> Iterator[Row]:
    """The rows of every operation; one that fails leaves the others."""
    for name, (check, op) in operations.items():
        try:
            yield from check(setting.device, op)
        except Exception as error:  # noqa: BLE001, what a compiler raises is a result too
            yield failed(name, error)
