"""The kernel of the views against its reference, pixel for pixel: interpreted, or on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import semi_fast.ops.rand_augment
from semi_fast.ops.rand_augment import OPERATIONS, ViewParameters, kernel, reference
from tests.conftest import DEVICE
from tests.offline import compile_offline

MEAN, STD = (torch.tensor(v, dtype=torch.float64) for v in ((0.4914, 0.4822, 0.4465), (0.25, 0.24, 0.26)))
LEVELS = range(1, 10)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN or the largest integer: a pixel that is not written cannot be right."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def drawn(rng: np.random.Generator, views: int, strong: int, turns: int, pad: int, side: int) -> ViewParameters:
    fields = (
        rng.integers(0, 2, views),
        rng.integers(0, 2 * pad + 1, (views, 2)),
        rng.integers(0, len(OPERATIONS), (strong, turns)),
        rng.integers(1, 10, (strong, turns)),
        rng.choice([-1, 1], (strong, turns)),
        rng.integers(0, side, (strong, 2)),
    )
    return ViewParameters(*(torch.from_numpy(field) for field in fields))


def every_setting(levels: Iterable[int]) -> ViewParameters:
    """Every operation and sign at these levels, and nothing else."""
    settings = torch.tensor(list(product(range(len(OPERATIONS)), levels, (-1, 1))))
    operation, level, sign = (column.contiguous() for column in settings.unsqueeze(2).unbind(1))
    n = len(settings)
    flip, crop, corner = (torch.zeros(shape, dtype=torch.int64) for shape in ((n,), (n, 2), (n, 2)))
    return ViewParameters(flip, crop, operation, level, sign, corner)


def run(images: np.ndarray, sources: Any, parameters: ViewParameters, *options: Any) -> Tensor:
    """The kernel on the device, in poisoned memory."""
    tensors = (torch.from_numpy(images), torch.as_tensor(sources), *parameters, MEAN, STD)
    with poisoned():
        return kernel.rand_augment(*(tensor.to(DEVICE) for tensor in tensors), *options)


def check(images: np.ndarray, sources: Any, parameters: ViewParameters, **changes: Any) -> Tensor:
    """The kernel's views, equal in every bit and stride to those of the reference on a CPU, which are Pillow's."""
    options = {"pad": 0, "cutout": 0, "zero_padded": 0, "dtype": torch.float32} | changes
    tensors = torch.from_numpy(images), torch.as_tensor(sources)
    expected = reference.rand_augment(*tensors, parameters, mean=MEAN, std=STD, **options)
    ours = run(images, sources, parameters, *options.values())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.stride() == expected.stride()
    assert ours.dtype == expected.dtype
    wrong = (ours.cpu() != expected).flatten(1).any(1).nonzero().flatten().tolist()
    assert wrong == [], f"views {wrong}"
    return ours


def hard_images(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """What histograms stumble over: flat, two colours, a few neighbouring values, noise."""
    shape = (height, width, 3)
    flat = [np.full(shape, value, np.uint8) for value in (0, 93, 255)]
    two = np.where(rng.random((height, width, 1)) < 0.3, np.uint8(17), np.uint8(203)).repeat(3, 2)
    near = rng.integers(100, (102, 103, 104), shape, dtype=np.uint8)
    return np.stack([*flat, two, near, rng.integers(0, 256, shape, dtype=np.uint8)])


def test_every_operation_level_and_sign_on_photographs(natural_images: np.ndarray) -> None:
    parameters = every_setting(LEVELS)
    check(np.ascontiguousarray(natural_images[:, :20, :24]), np.arange(len(parameters.flip)) % 60, parameters)


@pytest.mark.parametrize("image", range(6))
def test_every_operation_on_hard_images(image: int) -> None:
    parameters = every_setting((LEVELS[image], LEVELS[-1]))
    images = hard_images(np.random.default_rng(1), 7, 12)
    check(images, np.full(len(parameters.flip), image), parameters)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (64, 64), (17, 23), (1, 1), (2, 5)])
def test_whole_views_of_many_sizes(height: int, width: int) -> None:
    """Flip, crop, two operations and cutout; the box ends inside, at the border and outside of the image."""
    rng, pad = np.random.default_rng(height), min(height, width) // 4
    images, views = hard_images(rng, height, width), 8 if height == 64 else 24
    parameters = drawn(rng, views, views - 2, 2, pad, min(height, width))
    sources = rng.integers(0, len(images), views)
    ours = check(images, sources, parameters, pad=pad, cutout=min(height, width) // 2)
    assert not torch.equal(ours, check(images, sources, parameters, pad=pad)) or height == 1


@pytest.mark.parametrize(
    ("views", "strong", "turns"),
    [(1, 0, 2), (1, 1, 2), (5, 0, 0), (6, 4, 0), (6, 4, 1), (12, 10, 3), (0, 0, 2)],
)
def test_any_number_of_views_and_operations(views: int, strong: int, turns: int) -> None:
    rng = np.random.default_rng(views)
    images = hard_images(rng, 11, 13)
    check(images, rng.integers(0, 6, views), drawn(rng, views, strong, turns, 3, 11), pad=3, cutout=4)


@pytest.mark.parametrize("zero_padded", [1, 4, 9])
def test_the_first_views_are_padded_by_black(zero_padded: int) -> None:
    """Also where that reaches into the strong views."""
    rng = np.random.default_rng(7)
    images = hard_images(rng, 12, 9)[2:]
    parameters, sources = drawn(rng, 9, 4, 2, 5, 9), rng.integers(0, 4, 9)
    ours = check(images, sources, parameters, pad=5, cutout=3, zero_padded=zero_padded)
    assert not torch.equal(ours, check(images, sources, parameters, pad=5, cutout=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    check(hard_images(rng, 20, 16), rng.integers(0, 6, 20), drawn(rng, 20, 10, 2, 2, 16), pad=2, cutout=5, dtype=dtype)


def test_bfloat16() -> None:
    """Rounded to nearest on a GPU; the interpreter cuts the last 16 bits off."""
    rng = np.random.default_rng(3)
    parameters, sources = drawn(rng, 20, 10, 2, 2, 16), rng.integers(0, 6, 20)
    images = hard_images(rng, 20, 16)
    if DEVICE.type == "cuda":
        check(images, sources, parameters, pad=2, cutout=5, dtype=torch.bfloat16)
        return
    exact = check(images, sources, parameters, pad=2, cutout=5)
    ours = run(images, sources, parameters, 2, 5, 0, torch.bfloat16)
    assert torch.equal(ours.float(), (exact.view(torch.int32) & -0x10000).view(torch.float32))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_fast.ops.rand_augment, "has_kernel", lambda device: True)


def some_arguments(device: torch.device = DEVICE) -> tuple[Tensor, Tensor, ViewParameters]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(hard_images(rng, 8, 10)).to(device)
    parameters = ViewParameters(*(field.to(device) for field in drawn(rng, 5, 3, 2, 2, 8)))
    return images, torch.tensor([0, 5, 3, 3, 4], device=device), parameters


@pytest.mark.usefixtures("everywhere")
def test_the_public_function_runs_it_and_can_be_compiled() -> None:
    images, sources, parameters = some_arguments()
    mean, std = MEAN.to(DEVICE), STD.to(DEVICE)
    options = {"pad": 2, "cutout": 3, "mean": mean, "std": std, "dtype": torch.float32, "zero_padded": 1}
    there = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = reference.rand_augment(*some_arguments(torch.device("cpu")), **there).to(DEVICE)

    def call(*tensors: Any) -> Tensor:
        return semi_fast.ops.rand_augment.rand_augment(*tensors, **options)

    strided = parameters._replace(crop=parameters.crop.t().contiguous().t())
    assert torch.equal(call(images, sources, strided), expected)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, sources, parameters), expected)


def test_the_operation_is_registered_as_it_behaves() -> None:
    images, sources, parameters = some_arguments()
    weak = ViewParameters(*(field.to(DEVICE) for field in drawn(np.random.default_rng(1), 5, 0, 0, 2, 8)))
    for dtype, fields in ((torch.float32, parameters), (torch.bfloat16, weak)):
        tensors = images, sources, *fields, MEAN.to(DEVICE), STD.to(DEVICE)
        torch.library.opcheck(kernel.rand_augment, (*tensors, 2, 3, 1, dtype))


def test_fake_tensors_on_a_gpu_pass_without_one() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, sources, parameters = some_arguments(torch.device("cuda"))
        mean = MEAN.to(images.device)
        views = semi_fast.ops.rand_augment.rand_augment(
            images, sources, parameters, pad=2, cutout=3, mean=mean, std=mean, dtype=torch.bfloat16
        )
        assert (views.shape, views.dtype, views.device.type) == ((5, 3, 8, 10), torch.bfloat16, "cuda")
        assert views.is_contiguous(memory_format=torch.channels_last)


def offline_case(out: str, last: bool) -> dict[str, Any]:
    """Sizes are arguments: one compiled kernel serves 32 x 32 and 64 x 64."""
    launch = dict(kernel.LAUNCH)
    constants = {"LAST": last, "WIDE": False, "BLOCK": launch.pop("BLOCK")}
    special = {"images_ptr": "*u8", "previous_ptr": "*u8", "affine_ptr": "*i32", "factor_ptr": "*fp32", "out_ptr": out}
    special |= dict.fromkeys(("mean_ptr", "std_ptr"), "*fp64") | dict.fromkeys(constants, "constexpr")
    signature = {
        name: special.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in kernel.view_kernel.arg_names
    }
    return {"signature": signature, "constants": constants, **launch}


def test_it_compiles_for_gpus_without_spills_or_fused_arithmetic() -> None:
    """A fused multiplication and addition rounds once instead of twice: blends would differ from Pillow's."""
    exact = [offline_case(*case) for case in (("*u8", False), ("*bf16", True), ("*fp16", True), ("*fp32", True))]
    fused = exact[0] | {"enable_fp_fusion": True}
    *results, ampere, hopper = compile_offline("semi_fast.ops.rand_augment.kernel", "view_kernel", [*exact, fused])
    assert len(results) == 8
    for result in results:
        assert result["spills"] == 0
        assert result["fused"] == 0
        assert result["registers"] <= 96
    assert min(ampere["fused"], hopper["fused"]) > 0, "fusion would be seen"
