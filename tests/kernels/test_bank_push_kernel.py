"""The bank's kernel against its reference, bit for bit, over many pushes with ties and decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from semi_fast.ops.bank_push import bank_push, kernel, reference
from semi_fast.ops.door import LARGEST
from tests.conftest import DEVICE
from tests.offline import compile_offline

SIZES = [(3, 4, 5, 7), (10, 128, 128, 128), (2, 3, 70, 40), (127, 8, 16, 30), (1000, 2, 3, 16), (4, 1, 3, 1)]
SIZES += [(2, 130, 3, 128), (1, 70, 3, 60)]  # full banks of several chunks


def empty(classes: int, slots: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.zeros(classes, slots, width, dtype=dtype, device=DEVICE),
        torch.zeros(classes, slots, dtype=dtype, device=DEVICE),
        torch.full((classes, slots), -1, device=DEVICE),
        torch.zeros(classes, width, dtype=torch.float64, device=DEVICE),
    ]


def offers(classes: int, width: int, rows: int, step: int, dtype: torch.dtype) -> list[Tensor]:
    """Confidences of six values, so that ties are the rule; zero, negative and NaN among them."""
    torch.manual_seed(step)
    confidences = torch.randint(-1, 6, (rows,)) / 5
    confidences[torch.rand(rows) < 0.1] = torch.nan
    drawn = (
        torch.randn(rows, width).to(dtype),
        torch.randint(0, classes, (rows,)),
        confidences,
        torch.rand(rows) < 0.9,
        step * rows + torch.arange(rows),
    )
    return [x.to(DEVICE) for x in drawn]


@pytest.mark.parametrize("oldest_leaves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "slots", "width", "rows"), SIZES)
def test_equals_the_reference(
    classes: int, slots: int, width: int, rows: int, dtype: torch.dtype, oldest_leaves: bool
) -> None:
    ours, expected, same = (empty(classes, slots, width, dtype) for _ in range(3))
    for step in range(2 if classes > 100 or width > 100 else 6 if slots > 64 else 12):
        offered = offers(classes, width, rows, step, torch.float16 if step % 2 else torch.float32)
        kernel.bank_push(*ours, *offered, oldest_leaves)
        reference.bank_push(*expected, *offered, oldest_leaves=oldest_leaves)
        bank_push(*same, *offered, oldest_leaves=oldest_leaves)
        for mine, theirs, public in zip(ours, expected, same, strict=True):
            assert torch.equal(mine, theirs)
            assert torch.equal(public, theirs)
        for state in (ours, expected, same):
            state[1] *= 0.99
    torch.testing.assert_close(ours[3], ours[0].double().sum(1), rtol=0, atol=1e-12)
    assert (ours[2] >= 0).any()


def test_nothing_offered_changes_nothing() -> None:
    state = empty(3, 2, 4, torch.float32)
    offered = offers(3, 4, 5, 0, torch.float32)
    offered[3][:] = False
    kernel.bank_push(*state, *offered, False)
    assert state[1].eq(0).all()
    assert state[2].eq(-1).all()


def test_opcheck() -> None:
    torch.library.opcheck(kernel.bank_push, (*empty(3, 2, 4, torch.float32), *offers(3, 4, 5, 0, torch.float32), False))


def test_compiles_whole() -> None:
    """As an opaque node of a graph: what a step compiled by torch makes of it."""
    offered = offers(3, 4, 6, 0, torch.float32)

    def program(state: list[Tensor]) -> Tensor:
        kernel.bank_push(*state, *offered, False)
        return state[1] * 2

    plain, compiled = empty(3, 2, 4, torch.float32), empty(3, 2, 4, torch.float32)
    expected = program(plain)
    assert expected.any()
    assert torch.equal(torch.compile(program, fullgraph=True, backend="aot_eager")(compiled), expected)
    assert torch.equal(compiled[0], plain[0])


@pytest.mark.timeout(300)
def test_spills_no_register() -> None:
    pointers = {
        "features_ptr": "*fp32",
        "confidences_ptr": "*fp32",
        "inserted_ptr": "*i64",
        "sums_ptr": "*fp64",
        "new_features_ptr": "*fp32",
        "new_labels_ptr": "*i64",
        "new_confidences_ptr": "*fp32",
        "mask_ptr": "*i1",
        "number_ptr": "*i64",
    }
    cases = []
    largest = LARGEST["bank_push"]
    for slots, rows, width in ((128, 896, 128), (512, 2048, 2048), (largest, largest, 128)):
        constants = kernel.launch_options(slots, rows, width) | {"OLDEST_LEAVES": False}
        warps = constants.pop("num_warps")
        sizes = dict.fromkeys(("classes", "slots", "width", "rows"), "i32")
        signature = pointers | sizes | dict.fromkeys(constants, "constexpr")
        cases.append({"signature": signature, "constants": constants, "num_warps": warps})
    found = compile_offline("semi_fast.ops.bank_push.kernel", "push_kernel", cases)
    assert len(found) == 6
    assert all(case["spills"] == 0 for case in found), found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sums", lambda x: x.float(), "sums must be float64; got float32"),
        ("new_labels", lambda x: x[:-1], r"new_features must have shape \[4, 3\]; got \[5, 3\]"),
        ("new_features", lambda x: x[:, :-1], r"new_features must have shape \[5, 3\]; got \[5, 2\]"),
        ("mask", lambda x: x.long(), "mask must be bool; got int64"),
        ("new_labels", lambda x: x[0], r"new_labels must have shape \[any\]; got \[\]"),
        ("inserted", lambda x: x.to("meta"), "inserted must be on"),
        ("features", lambda x: x.expand(2, 2, 3, 3)[0].transpose(0, 1), "features must be contiguous"),
    ],
)
def test_wrong_inputs_are_named(name: str, change: object, message: str) -> None:
    names = ("features", "confidences", "inserted", "sums")
    names += ("new_features", "new_labels", "new_confidences", "mask", "number")
    inputs = dict(zip(names, empty(2, 2, 3, torch.float32) + offers(2, 3, 5, 0, torch.float32), strict=True))
    if name == "features":
        inputs[name] = inputs[name].transpose(0, 1)
    else:
        inputs[name] = change(inputs[name])  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        bank_push(**inputs)
