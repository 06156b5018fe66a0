"""The kernel of the drawing against its reference and the published vectors, word for word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import semi_fast.ops.draw_views
from semi_fast.ops.draw_views import kernel, reference
from semi_fast.ops.rand_augment import IDENTITY, ViewParameters
from tests.conftest import DEVICE
from tests.offline import compile_offline
from tests.test_philox import KNOWN

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0xA40938222991F31D0]


@triton.jit(do_not_specialize=("seed",))
def words_kernel(seed, counter_ptr, out_ptr):
    """The four words of one counter, by the function that the drawing uses."""
    at = tl.arange(0, 1)
    c0 = tl.load(counter_ptr + at).to(tl.uint32)
    c1 = tl.load(counter_ptr + 1 + at).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 + at).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 + at).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + 1 + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 + at, w3.to(tl.int64))


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](kernel.as_signed(key), torch.tensor(counter, device=DEVICE), out)
    assert tuple(out.tolist()) == words


def test_a_seed_keeps_its_64_bits() -> None:
    for seed in SEEDS:
        assert (kernel.as_signed(seed) - seed) % 2**64 == 0
        assert -(2**63) <= kernel.as_signed(seed) < 2**63


def draw(public: Any, seed: int, layout: tuple[int, int, int], **changes: Any) -> tuple[Tensor, ViewParameters]:
    """Views of rows whose ids and visits are any 32-bit numbers."""
    rng, n = np.random.default_rng(layout[0]), layout[0] + layout[1]
    ids, visits = (torch.from_numpy(rng.integers(0, 2**32, n)).to(DEVICE) for _ in range(2))
    options = {"seed": seed, "resolution": (32, 40), "flip": True, "pad": 4, "cutout": 15, "operations": 2} | changes
    labeled, unlabeled, strong_views = layout
    return public(ids, visits, labeled=labeled, unlabeled=unlabeled, strong_views=strong_views, **options)


def check(seed: int, layout: tuple[int, int, int], **changes: Any) -> ViewParameters:
    """The public function by its kernel, in memory that was poisoned, equal to the reference."""
    torch.use_deterministic_algorithms(True)  # fills fresh memory with the largest integer
    try:
        sources, ours = draw(semi_fast.ops.draw_views.draw_views, seed, layout, **changes)
    finally:
        torch.use_deterministic_algorithms(False)
    expected_sources, expected = draw(reference.draw_views, seed, layout, **changes)
    assert torch.equal(sources, expected_sources)
    for name, field, wanted in zip(ViewParameters._fields, ours, expected, strict=True):
        assert field.dtype == wanted.dtype, name
        assert torch.equal(field, wanted), name
    return ours


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_fast.ops.draw_views, "has_kernel", lambda device: True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed(seed: int) -> None:
    drawn = check(seed, (9, 40, 2))
    assert drawn.flip.sum() > 0
    assert (drawn.operation == IDENTITY).any()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "layout", [(64, 64, 2), (1, 0, 0), (0, 1, 1), (5, 0, 2), (3, 7, 0), (0, 0, 0), (128, 1, 1), (3, 50, 5)]
)
def test_every_layout(layout: tuple[int, int, int]) -> None:
    check(3, layout)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "changes",
    [
        {"flip": False},
        {"pad": 0},
        {"pad": 31},
        {"cutout": 0},
        {"cutout": 16},
        {"cutout": 40},
        {"operations": 0},
        {"operations": 1},
        {"operations": 5},
        {"resolution": (33, 7), "pad": 1},
    ],
)
def test_every_option(changes: dict[str, Any]) -> None:
    check(5, (4, 30, 2), **changes)


@pytest.mark.usefixtures("everywhere")
def test_it_can_be_compiled() -> None:
    def call(ids: Tensor) -> tuple[Tensor, ViewParameters]:
        return semi_fast.ops.draw_views.draw_views(
            ids, ids, labeled=2, unlabeled=3, strong_views=2, seed=2**64 - 1,
            resolution=(32, 32), flip=True, pad=4, cutout=16, operations=2,
        )  # fmt: skip

    ids = torch.arange(5, device=DEVICE)
    sources, drawn = torch.compile(call, fullgraph=True, backend="aot_eager")(ids)
    expected_sources, expected = call(ids)
    assert torch.equal(sources, expected_sources)
    assert all(map(torch.equal, drawn, expected))


def test_the_operation_is_registered_as_it_behaves() -> None:
    ids = torch.arange(5, device=DEVICE)
    for strong_views, seed in ((2, -1), (0, 7)):
        torch.library.opcheck(kernel.draw_views, (ids, ids, 2, 3, strong_views, seed, 32, 40, True, 4, 16, 2))


def test_fake_tensors_on_a_gpu_pass_without_one() -> None:
    with FakeTensorMode():
        ids = torch.arange(5, device="cuda")
        sources, drawn = semi_fast.ops.draw_views.draw_views(
            ids, ids, labeled=2, unlabeled=3, strong_views=2, seed=2**64 - 1,
            resolution=(32, 32), flip=True, pad=4, cutout=16, operations=2,
        )  # fmt: skip
        assert sources.shape == (11,)
        assert [tuple(field.shape) for field in drawn] == [(11,), (11, 2), (6, 2), (6, 2), (6, 2), (6, 2)]
        assert {field.device.type for field in drawn} == {"cuda"}


def test_it_compiles_for_gpus_without_spills() -> None:
    """A small seed is passed in 32 bits, a large one in 64."""
    names = kernel.draw_kernel.arg_names
    cases = []
    for seed in ("i32", "i64"):
        types = {"seed": seed, "BLOCK": "constexpr"}
        signature = {name: types.get(name, "*i64" if name.endswith("_ptr") else "i32") for name in names}
        cases.append({"signature": signature, "constants": {"BLOCK": kernel.BLOCK}, "num_warps": 4})
    results = compile_offline("semi_fast.ops.draw_views.kernel", "draw_kernel", cases)
    assert len(results) == 4
    for result in results:
        assert result["spills"] == 0
        assert result["registers"] <= 64
