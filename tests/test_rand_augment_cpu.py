"""The views that numba compiles for a CPU, equal to those of the reference in every bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import semi_fast.ops.rand_augment
from semi_fast.ops.rand_augment import OPERATIONS, ViewParameters, reference

from .libraries import needs

MEAN, STD = (torch.tensor(v, dtype=torch.float64) for v in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def numba() -> None:
    needs("cpu")


def check(images: Tensor, sources: Tensor, parameters: ViewParameters, **changes: Any) -> Tensor:
    """The compiled views, equal to the reference's in every bit, type and stride."""
    from semi_fast.ops.rand_augment import cpu

    options = {"pad": 0, "cutout": 0, "zero_padded": 0, "dtype": torch.float32} | changes
    expected = reference.rand_augment(images, sources, parameters, mean=MEAN, std=STD, **options)
    ours = cpu.rand_augment(images, sources, parameters, mean=MEAN, std=STD, **options)
    assert (ours.shape, ours.stride(), ours.dtype) == (expected.shape, expected.stride(), expected.dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    different = ours.permute(0, 2, 3, 1).view(bits) != expected.permute(0, 2, 3, 1).view(bits)
    assert different.flatten(1).any(1).nonzero().flatten().tolist() == []
    return ours


def some_images(rng: np.random.Generator, height: int, width: int) -> Tensor:
    """What histograms stumble over: flat, two colours, a few neighbouring values, noise."""
    shape = (height, width, 3)
    flat = [np.full(shape, value, np.uint8) for value in (0, 93, 255)]
    two = np.where(rng.random((height, width, 1)) < 0.3, np.uint8(17), np.uint8(203)).repeat(3, 2)
    near = rng.integers(100, (102, 103, 104), shape, dtype=np.uint8)
    return torch.from_numpy(np.stack([*flat, two, near, rng.integers(0, 256, shape, dtype=np.uint8)]))


def drawn(
    rng: np.random.Generator, views: int, strong: int, turns: int, pad: int, height: int, width: int
) -> ViewParameters:
    fields = (
        rng.integers(0, 2, views),
        rng.integers(0, 2 * pad + 1, (views, 2)),
        rng.integers(0, len(OPERATIONS), (strong, turns)),
        rng.integers(1, 10, (strong, turns)),
        rng.choice([-1, 1], (strong, turns)),
        rng.integers(0, (height, width), (strong, 2)),
    )
    return ViewParameters(*(torch.from_numpy(field) for field in fields))


@settings(max_examples=120)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    weak=st.integers(0, 6),
    strong=st.integers(0, 24),
    turns=st.integers(0, 3),
    cutout=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_views(
    height: int, width: int, weak: int, strong: int, turns: int, cutout: int, dtype: torch.dtype, seed: int
) -> None:
    rng, views = np.random.default_rng(seed), weak + strong
    pad = int(rng.integers(0, min(height, width)))
    images, sources = some_images(rng, height, width), torch.from_numpy(rng.integers(0, 6, views))
    parameters = drawn(rng, views, strong, turns, pad, height, width)
    black = int(rng.integers(0, views + 1))
    check(images, sources, parameters, pad=pad, cutout=cutout, zero_padded=black, dtype=dtype)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_level_and_sign_of_an_operation(name: str, natural_images: np.ndarray) -> None:
    photographs = torch.from_numpy(natural_images[:8])
    wide = torch.from_numpy(np.ascontiguousarray(natural_images[8:16, 3:26]))
    for images in (photographs, wide, some_images(np.random.default_rng(2), 24, 40)):
        n = len(images)
        choices = torch.cartesian_prod(torch.arange(n), torch.arange(1, 10), torch.tensor([-1, 1]))
        sources, level, sign = (column.contiguous() for column in choices.unbind(1))
        zeros, pairs = torch.zeros_like(sources), torch.zeros(len(sources), 2, dtype=torch.int64)
        operation = torch.full_like(level, list(OPERATIONS).index(name))
        turns = (column.unsqueeze(1) for column in (operation, level, sign))
        check(images, sources, ViewParameters(zeros, pairs, *turns, pairs))


def a_step(views: int = 20, side: int = 24) -> tuple[Tensor, Tensor, ViewParameters]:
    rng = np.random.default_rng(4)
    sources = torch.from_numpy(rng.integers(0, 6, views))
    return some_images(rng, side, side), sources, drawn(rng, views, views - 4, 2, 3, side, side)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_several_threads_make_the_same_views(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from semi_fast.ops.rand_augment import cpu

    seen, make = set(), cpu.make_views
    monkeypatch.setattr(cpu, "make_views", lambda *given: (seen.add(threading.get_ident()), make(*given)))
    for views in (20, 5, 4):
        check(*a_step(views), pad=3, cutout=9, zero_padded=2)
    assert seen
    assert threading.get_ident() not in seen
    assert len(seen) <= threads


def test_strided_arguments_are_read_as_they_are() -> None:
    images, sources, parameters = a_step()
    turned = images.transpose(1, 2).contiguous().transpose(1, 2)
    strided = parameters._replace(crop=parameters.crop.t().contiguous().t(), flip=parameters.flip.repeat(2)[::2] * 0)
    assert not turned.is_contiguous()
    check(turned, sources, strided, pad=3, cutout=9)


@pytest.mark.parametrize("obstacle", ["", "NUMBA_DISABLE_JIT is set"])
def test_the_public_function_runs_them_unless_something_is_in_the_way(
    obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semi_fast.ops import door
    from semi_fast.ops.rand_augment import cpu

    calls: list[str] = []

    def noted(name: str, make: Any) -> Any:
        return lambda *given, **options: (calls.append(name), make(*given, **options))[1]

    monkeypatch.setattr(door, "find_numba_obstacle", lambda: obstacle)
    monkeypatch.setattr(cpu, "rand_augment", noted("compiled", cpu.rand_augment))
    monkeypatch.setattr(reference, "rand_augment", noted("reference", reference.rand_augment))
    options = {"pad": 3, "cutout": 9, "mean": MEAN, "std": STD, "dtype": torch.float32, "zero_padded": 2}
    semi_fast.ops.rand_augment.rand_augment(*a_step(), **options)
    assert calls == ["reference" if obstacle else "compiled"]


def run_python(code: str, **environment: str) -> str:
    end = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert end.returncode == 0, end.stderr
    return end.stdout.strip()


def test_numba_is_imported_where_views_are_made_and_not_before() -> None:
    code = "import sys, semi_fast.pipelines.augment; print('numba' in sys.modules)"
    assert run_python(code) == "False"


def test_numba_can_be_switched_off() -> None:
    code = "import torch; from semi_fast.ops.door import backend; print(backend(torch.device('cpu')))"
    assert run_python(code, NUMBA_DISABLE_JIT="1").endswith("; views not compiled: NUMBA_DISABLE_JIT is set")


def test_without_a_folder_to_keep_compiled_code_it_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from semi_fast.ops.rand_augment import cpu

    options: list[dict[str, bool]] = []

    def njit(**given: bool) -> Any:
        options.append(given)
        if given.get("cache"):
            raise RuntimeError("cannot cache function 'f': no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu, "njit", njit)
    assert cpu.compiled(len) is len
    assert options == [{"cache": True, "nogil": True}, {"nogil": True}]
