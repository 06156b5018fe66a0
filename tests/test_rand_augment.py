"""The views against Pillow, pixel for pixel, and the parameters they are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from semi_fast.batch import RowLayout, Rows, split_rows
from semi_fast.ops.rand_augment import IDENTITY, OPERATIONS, ViewParameters, apply_operations, rand_augment
from semi_fast.pipelines.augment import Augmenter
from semi_fast.schema.data import AugmentConfig

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def pillow(name: str, image: Image.Image, level: int, sign: int) -> Image.Image:
    """One operation the way the FixMatch lineage calls Pillow."""
    factor, part = float(level) * 0.9 / 10 + 0.05, sign * float(level) * 0.3 / 10
    width, height = image.size

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix)

    calls: dict[str, Callable[[], Image.Image]] = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "equalize": lambda: ImageOps.equalize(image),
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, int(level * 4 / 10) + 4),
        "rotate": lambda: image.rotate(sign * int(level * 30 / 10)),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear_x": lambda: affine(1, part, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, part, 1, 0),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
        "translate_x": lambda: affine(1, 0, int(part * width), 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, int(part * height)),
    }
    return calls[name]()


def every_setting(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ours, Pillow's) for all levels and signs of an operation."""
    index, n = list(OPERATIONS).index(name), len(images)
    ours, theirs = [], []
    for level in range(1, 10):
        for sign in (-1, 1):
            parameters = (torch.full((n,), v) for v in (index, level, sign))
            ours.append(apply_operations(torch.from_numpy(images), *parameters).numpy())
            theirs.append(np.stack([np.asarray(pillow(name, Image.fromarray(i), level, sign)) for i in images]))
    return np.stack(ours), np.stack(theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_level_and_sign_equals_pillow(name: str, natural_images: np.ndarray) -> None:
    ours, theirs = every_setting(name, natural_images[:24])
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_sizes_and_flat_images(name: str, natural_images: np.ndarray) -> None:
    """Not square, and what histograms stumble over: one colour, two colours, black, white, noise."""
    rng = np.random.default_rng(1)
    wide = [np.asarray(Image.fromarray(i).resize((40, 24))) for i in natural_images[:3]]
    flat = [np.full((24, 40, 3), v, np.uint8) for v in (0, 93, 255)]
    two = np.where(rng.random((24, 40, 1)) < 0.3, np.uint8(17), np.uint8(203)).repeat(3, 2)
    images = np.stack([*wide, *flat, two, rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)])
    ours, theirs = every_setting(name, images)
    np.testing.assert_array_equal(ours, theirs)


def test_each_row_gets_its_own_operation(natural_images: np.ndarray) -> None:
    images = torch.from_numpy(natural_images[: len(OPERATIONS)])
    operation = torch.arange(len(OPERATIONS))
    level, sign = torch.full_like(operation, 5), torch.ones_like(operation)
    mixed = apply_operations(images, operation, level, sign)
    for k, transform in enumerate(OPERATIONS.values()):
        assert torch.equal(mixed[k], transform(images[k : k + 1], level[:1], sign[:1])[0])


def test_the_form_without_waiting_gives_the_same_pixels(natural_images: np.ndarray) -> None:
    """What a GPU runs: every operation on every row, then a selection; here on a CPU by hand."""
    images = torch.from_numpy(natural_images)
    generator = torch.Generator().manual_seed(0)
    operation, level = (torch.randint(a, b, (len(images),), generator=generator) for a, b in ((0, 14), (1, 10)))
    sign = torch.ones_like(level)
    dense = images.clone()
    for k, transform in enumerate(OPERATIONS.values()):
        dense = torch.where((operation == k).view(-1, 1, 1, 1), transform(images, level, sign), dense)
    assert torch.equal(dense, apply_operations(images, operation, level, sign))


def weak_in_pillow(image: np.ndarray, flip: bool, y: int, x: int, pad: int) -> np.ndarray:
    flipped = image[:, ::-1] if flip else image
    padded = np.pad(flipped, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    return padded[y : y + image.shape[0], x : x + image.shape[1]]


def cutout_by_rule(image: np.ndarray, centre: tuple[float, float], size: int) -> np.ndarray:
    """The published rule, with real numbers and Pillow's inclusive rectangle."""
    from PIL import ImageDraw

    height, width = image.shape[:2]
    y, x = centre
    x0, y0 = int(max(0, x - size / 2.0)), int(max(0, y - size / 2.0))
    x1, y1 = int(min(width, x0 + size)), int(min(height, y0 + size))
    picture = Image.fromarray(image.copy())
    ImageDraw.Draw(picture).rectangle((x0, y0, x1, y1), (127, 127, 127))
    return np.asarray(picture)


def test_zero_padding_is_a_crop_of_the_black_padded_image_then_a_flip(natural_images: np.ndarray) -> None:
    """The published order for the labeled images of ImageNet-127; the corner is mirrored with the image."""
    rng, n, pad = np.random.default_rng(5), 12, 8
    flip, crop = rng.integers(0, 2, n), rng.integers(0, 2 * pad + 1, (n, 2))
    none = torch.zeros(4, 0, dtype=torch.int64)
    parameters = ViewParameters(
        torch.from_numpy(flip), torch.from_numpy(crop), none, none, none, torch.zeros(4, 2, dtype=torch.int64)
    )
    ours = rand_augment(
        torch.from_numpy(natural_images), torch.arange(n), parameters, pad=pad, cutout=0, zero_padded=7,
        mean=torch.zeros(3), std=torch.ones(3), dtype=torch.float64,
    )  # fmt: skip
    pixels = (ours * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(n):
        image, (y, x) = natural_images[i], crop[i]
        if i < 7:
            padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
            left = 2 * pad - x if flip[i] else x
            expected = padded[y : y + 32, left : left + 32]
            expected = expected[:, ::-1] if flip[i] else expected
        else:
            expected = weak_in_pillow(image, bool(flip[i]), y, x, pad)
        np.testing.assert_array_equal(pixels[i], expected, err_msg=f"view {i}")


def test_the_padding_of_labeled_images_is_an_option(natural_images: np.ndarray) -> None:
    batch = rows(natural_images, 20, 5, 1)
    reflected, black = (
        split_rows(augmenter(labeled_padding=padding).views(batch), batch.layout) for padding in ("reflect", "zero")
    )
    assert not torch.equal(reflected.labeled, black.labeled)
    assert torch.equal(reflected.weak, black.weak)
    assert torch.equal(reflected.strong, black.strong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_views_equal_a_chain_of_pillow_calls(natural_images: np.ndarray, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    n, r, pad, size, side = 20, 15, 4, 16, 32
    sources = rng.integers(0, 60, n)
    flip, crop = rng.integers(0, 2, n), rng.integers(0, 2 * pad + 1, (n, 2))
    operation, level = rng.integers(0, 14, (r, 2)), rng.integers(1, 10, (r, 2))
    sign = rng.choice([-1, 1], (r, 2))
    centre = rng.random((r, 2)) * side
    corner = np.floor(np.maximum(0, centre - size / 2)).astype(np.int64)
    parameters = ViewParameters(*(torch.from_numpy(v) for v in (flip, crop, operation, level, sign, corner)))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    ours = rand_augment(
        torch.from_numpy(natural_images), torch.from_numpy(sources), parameters,
        pad=pad, cutout=size, mean=mean, std=std, dtype=dtype,
    )  # fmt: skip
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for i in range(n):
        image = weak_in_pillow(natural_images[sources[i]], bool(flip[i]), *crop[i], pad)
        j = i - (n - r)
        if j >= 0:
            picture = Image.fromarray(np.ascontiguousarray(image))
            for turn in range(2):
                name = list(OPERATIONS)[operation[j, turn]]
                picture = pillow(name, picture, int(level[j, turn]), int(sign[j, turn]))
            image = cutout_by_rule(np.asarray(picture), (centre[j, 0], centre[j, 1]), size)
        expected = (torch.from_numpy(image.copy()).to(dtype) / 255 - mean.to(dtype)) / std.to(dtype)
        assert torch.equal(ours[i].permute(1, 2, 0), expected), f"view {i}"


def augmenter(**options: object) -> Augmenter:
    config = AugmentConfig(**options)  # type: ignore[arg-type]
    cpu = torch.device("cpu")
    return Augmenter(config, seed=7, resolution=(32, 32), mean=MEAN, std=STD, device=cpu, dtype=torch.float32)


def rows(images: np.ndarray, labeled: int, unlabeled: int, strong: int, ids: np.ndarray | None = None) -> Rows:
    n = labeled + unlabeled
    ids = np.arange(n) if ids is None else ids
    x = torch.from_numpy(images[ids % len(images)])
    layout = RowLayout(labeled, unlabeled, strong)
    return Rows(x, torch.from_numpy(ids), torch.zeros(n, dtype=torch.int64), torch.zeros(labeled).long(), layout)


def test_views_follow_the_sample_and_not_its_place(natural_images: np.ndarray) -> None:
    make = augmenter()
    ids = np.arange(8)
    order = np.array([3, 0, 1, 2, 7, 5, 4, 6])  # labeled rows stay labeled
    first = split_rows(make.views(rows(natural_images, 4, 4, 2, ids)), RowLayout(4, 4, 2))
    second = split_rows(make.views(rows(natural_images, 4, 4, 2, ids[order])), RowLayout(4, 4, 2))
    assert torch.equal(second.labeled, first.labeled[order[:4]])
    assert torch.equal(second.weak, first.weak[order[4:] - 4])
    for view in range(2):
        part = slice(4 * view, 4 * view + 4)
        assert torch.equal(second.strong[part], first.strong[part][order[4:] - 4])
    assert not torch.equal(first.strong[:4], first.strong[4:]), "strong_0 and strong_1 are drawn apart"


def test_another_visit_is_another_view(natural_images: np.ndarray) -> None:
    make, first = augmenter(), rows(natural_images, 4, 4, 1)
    later = first._replace(visits=first.visits + 1)
    assert not torch.equal(make.views(first), make.views(later))
    assert torch.equal(make.views(first), make.views(first))


def test_distribution_of_the_parameters(natural_images: np.ndarray) -> None:
    """10,000 images: every choice uniform, every operation happening half the time, all within 5 sigma."""
    n = 10_000
    drawn = augmenter().draw(rows(natural_images, 0, n, 1, np.arange(n)))

    def uniform(values: torch.Tensor, probability: float) -> None:
        expected = len(values) * probability
        for count in values.unique(return_counts=True)[1].tolist():
            assert abs(count - expected) < 5 * (expected * (1 - probability)) ** 0.5

    uniform(drawn.flip, 1 / 2)
    assert drawn.crop.min() == 0
    assert drawn.crop.max() == 8
    uniform(drawn.crop.flatten(), 1 / 9)
    happened = drawn.operation[drawn.operation != IDENTITY]
    assert abs(len(happened) / (2 * n) - 0.5 * 13 / 14) < 0.02
    uniform(drawn.level.flatten(), 1 / 9)
    uniform(drawn.sign.flatten(), 1 / 2)
    box = drawn.cutout.flatten()
    assert box.min() == 0
    assert box.max() == 23  # the centre is below 32, the box begins 8 pixels before it
    assert abs((box == 0).float().mean() - 9 / 32) < 0.02


def test_flip_can_be_switched_off(natural_images: np.ndarray) -> None:
    assert augmenter(flip=False).draw(rows(natural_images, 30, 30, 1)).flip.sum() == 0
    assert augmenter(flip=True).draw(rows(natural_images, 30, 30, 1)).flip.sum() > 0


def test_bad_settings_are_refused(natural_images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"augment\.cutout .* 40"):
        augmenter(cutout=40)
    with pytest.raises(ValueError, match=r"augment\.pad .* 32"):
        augmenter(pad=32)


VIEWS, STRONG = 3, 2


def arguments() -> dict[str, object]:
    """Good arguments of rand_augment, three views of which two are strong."""
    per_strong = (torch.zeros(STRONG, 2, dtype=torch.int64) for _ in range(4))
    parameters = ViewParameters(torch.zeros(VIEWS).long(), torch.zeros(VIEWS, 2).long(), *per_strong)
    return {
        "images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        "sources": torch.zeros(VIEWS).long(),
        "parameters": parameters,
        "pad": 1,
        "cutout": 2,
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "dtype": torch.float32,
        "zero_padded": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(1, 8, 8, 3)}, "images must be uint8; got float32"),
        (
            {"images": torch.zeros(1, 3, 8, 8).byte()},
            r"images must have shape \[any, any, any, 3\]; got \[1, 3, 8, 8\]",
        ),
        ({"images": torch.zeros(1, 8, 8, 3, device="meta").byte()}, "sources must be on meta; got cpu"),
        ({"images": torch.zeros(1, 8, 4097, 3).byte()}, "images must have sides .* 8 x 4097"),
        ({"sources": torch.zeros(VIEWS)}, "sources must be int64; got float32"),
        ({"parameters.flip": torch.zeros(VIEWS + 1).long()}, r"parameters\.flip must have shape \[3\]; got \[4\]"),
        ({"parameters.crop": torch.zeros(VIEWS).long()}, r"parameters\.crop must have shape \[3, 2\]; got \[3\]"),
        (
            {"parameters.operation": torch.zeros(STRONG).long()},
            r"parameters\.operation must have shape \[any, any\]; got \[2\]",
        ),
        (
            {"parameters.level": torch.zeros(STRONG, 1).long()},
            r"parameters\.level must have shape \[2, 2\]; got \[2, 1\]",
        ),
        ({"parameters.sign": torch.zeros(STRONG, 2)}, r"parameters\.sign must be int64; got float32"),
        ({"parameters.cutout": torch.zeros(1, 2).long()}, r"parameters\.cutout must have shape \[2, 2\]; got \[1, 2\]"),
        ({"mean": torch.zeros(2)}, r"mean must have shape \[3\]; got \[2\]"),
        ({"std": torch.zeros(3).long()}, "std must be float16 or .*; got int64"),
        ({"pad": 8}, r"pad must lie in 0\.\.7; got 8"),
        ({"cutout": -1}, "cutout must be at least 0; got -1"),
        ({"zero_padded": 4}, r"zero_padded must lie in 0\.\.3; got 4"),
        ({"dtype": torch.int64}, r"dtype must be a floating-point type; got torch\.int64"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    good = arguments()
    assert rand_augment(**good).shape == (VIEWS, 3, 8, 8)  # type: ignore[arg-type]
    parameters = good["parameters"]
    assert isinstance(parameters, ViewParameters)
    for name, value in change.items():
        if name.startswith("parameters."):
            change = {"parameters": parameters._replace(**{name.removeprefix("parameters."): value})}
    with pytest.raises(ValueError, match=message):
        rand_augment(**good | change)  # type: ignore[arg-type]


def test_more_strong_views_than_views_are_refused() -> None:
    good = arguments()
    parameters = good["parameters"]
    assert isinstance(parameters, ViewParameters)
    few = parameters._replace(flip=parameters.flip[:1], crop=parameters.crop[:1])
    with pytest.raises(ValueError, match=r"parameters\.operation must have at most 1 rows; got 2"):
        rand_augment(**good | {"sources": torch.zeros(1).long(), "parameters": few, "zero_padded": 0})  # type: ignore[arg-type]
