"""The operations that make views, on the images of a step, beside Pillow one image at a time."""

from __future__ import annotations

from random import Random

import torch
from PIL import Image
from torch import Tensor

from benchmarks.case import IMAGES, SEED, Case, Goal, Operation, repeated
from benchmarks.measure import Work
from benchmarks.reference import pillow_views
from semi_fast.ops.draw_views import draw_views as draw
from semi_fast.ops.rand_augment import IDENTITY, OPERATIONS, ViewParameters

SIDE, PAD, CUTOUT = 32, 4, 16
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
DRAWN = {
    "labeled": IMAGES,
    "unlabeled": IMAGES,
    "strong_views": 2,
    "seed": SEED,
    "resolution": (SIDE, SIDE),
    "flip": True,
    "pad": PAD,
    "cutout": CUTOUT,
    "operations": 2,
}


def draw_views(device: torch.device) -> list[Case]:
    ids, visits = torch.arange(2 * IMAGES, device=device), torch.zeros(2 * IMAGES, dtype=torch.int64, device=device)
    random, weak, strong = Random(SEED), 2 * IMAGES, 2 * IMAGES

    def plain() -> None:
        for _ in range(weak):
            pillow_views.draw_weak(random, PAD)
        for _ in range(strong):
            pillow_views.draw_strong(random, SIDE, PAD, CUTOUT)

    shape = f"N={weak + strong} H=W={SIDE}, {strong} of them strong"
    return [Case("draw_views", shape, lambda op: repeated(lambda: op(ids, visits, **DRAWN)), repeated(plain))]


def rand_augment(device: torch.device) -> list[Case]:
    ids = torch.arange(2 * IMAGES, device=device)
    sources, parameters = draw(ids, torch.zeros_like(ids), **DRAWN)
    strong = len(parameters.operation)
    last = parameters._replace(flip=parameters.flip[-strong:], crop=parameters.crop[-strong:])
    return [
        views_case(f"N={len(sources)} H=W={SIDE}, {strong} of them strong", sources, parameters, ()),
        views_case(
            f"R={strong} H=W={SIDE}, all strong",
            sources[-strong:],
            last,
            (Goal("cuda", "strong_views_per_second", 2e6, True),),
        ),
    ]


def views_case(shape: str, sources: Tensor, parameters: ViewParameters, goals: tuple[Goal, ...]) -> Case:
    """Random pixels; the plain code starts from uint8 arrays and ends with a batch on the host."""
    generator, device = torch.Generator().manual_seed(SEED), sources.device
    pixels = torch.randint(256, (2 * IMAGES, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    images, arrays, order, views = pixels.to(device), pixels.numpy(), sources.tolist(), as_views(parameters)
    mean, std = (torch.tensor(values, dtype=torch.float64, device=device) for values in (MEAN, STD))
    options = {"pad": PAD, "cutout": CUTOUT, "mean": mean, "std": std, "dtype": torch.float32, "zero_padded": 0}

    def work(op: Operation) -> Work:
        return Work([lambda: op(images, sources, parameters, **options)] * 2)

    def plain() -> None:
        pillow = [Image.fromarray(arrays[i]) for i in order]
        pillow_views.render_all(pillow, views, pad=PAD, cutout=CUTOUT, mean=MEAN, std=STD)

    return Case("rand_augment", shape, work, Work([plain] * 2), strong_views=len(parameters.operation), goals=goals)


def as_views(parameters: ViewParameters) -> list[pillow_views.View]:
    """The parameters of N views for the plain pipeline; an operation that does not happen is left out."""
    flips, crops, *strong = (field.tolist() for field in parameters)
    weak = [pillow_views.View(bool(f), (y, x)) for f, (y, x) in zip(flips, crops, strict=True)]
    names, found = list(OPERATIONS), weak[: len(weak) - len(strong[0])]
    for view, operations, levels, signs, (y, x) in zip(weak[len(found) :], *strong, strict=True):
        turns = zip(operations, levels, signs, strict=True)
        chosen = tuple((names[o], level, sign) for o, level, sign in turns if o != IDENTITY)
        found.append(pillow_views.View(view.flip, view.crop, chosen, (y, x)))
    return found
