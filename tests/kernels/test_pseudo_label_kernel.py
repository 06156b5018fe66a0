"""The pseudo-labels' kernel against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from semi_fast.ops.door import LARGEST
from semi_fast.ops.pseudo_label import PseudoLabels, kernel, pseudo_label, reference
from tests.conftest import DEVICE
from tests.offline import compile_offline

SIZES = [(1, 2, 5), (9, 10, 128), (5, 100, 20), (6, 127, 70), (3, 1000, 33), (3, 2048, 5)]
DEFAULT = (True, "or", "mixed", "or")
MODES = [DEFAULT, (False, "linear", "linear", "own_adjusted"), (False, "or", "mixed", "or")]
MODE_NAMES = ("renormalize", "mask_source", "entropy_source", "balanced_mask")


def inputs(rows: int, classes: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(rows * classes)
    drawn = [
        (4 * torch.randn(rows, classes)).to(dtype),
        (4 * torch.randn(rows, classes)).to(dtype),
        (0.3 * torch.randn(rows, width)).to(dtype),
        0.3 * torch.randn(classes, width),
        torch.rand(classes) > 0.3,
        0.4 * torch.rand(classes),
        torch.randn(classes),
        torch.tensor(0.75),
    ]
    return [x.to(DEVICE) for x in drawn]


def both(tensors: list[Tensor], mode: tuple[Any, ...] = DEFAULT, **numbers: float) -> list[PseudoLabels]:
    """(kernel, float64 reference)."""
    given = {"threshold": 0.5, "prototype_temperature": 2.0} | numbers
    found = kernel.pseudo_label(*tensors, *given.values(), *mode)
    double = [x if x.dtype == torch.bool else x.double() for x in tensors]
    expected = reference.pseudo_label(*double, **given, **dict(zip(MODE_NAMES, mode, strict=True)))
    return [PseudoLabels(*found), PseudoLabels(*expected)]


def compare(found: PseudoLabels, expected: PseudoLabels, threshold: float = 0.5) -> None:
    """Floats to 1e-5; labels and masks exactly where the choice is not a tie within 3e-4 (spec 3.2, item 9)."""
    top = expected.probs.topk(2, 1).values
    clear = ((top[:, 0] - top[:, 1]) > 3e-4) & ((expected.confidence - threshold).abs() > 3e-4)
    assert clear.float().mean() > 0.6
    for name in ("confidence", "hardness", "probs"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for name in ("label", "mask", "adjusted_label", "adjusted_mask"):
        assert torch.equal(getattr(found, name)[clear], getattr(expected, name)[clear]), name
    counted = (found.mask & (found.label == torch.arange(len(found.counts), device=DEVICE)[:, None])).sum(1)
    assert torch.equal(found.counts, counted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "classes", "width"), SIZES)
def test_equals_the_reference(rows: int, classes: int, width: int, dtype: torch.dtype, mode: tuple[Any, ...]) -> None:
    compare(*both(inputs(rows, classes, width, dtype), mode))


def test_saturated_logits() -> None:
    tensors = inputs(10, 10, 16, torch.float32)
    tensors[0] = 1e4 * torch.eye(10, device=DEVICE)
    tensors[1] = -tensors[0]
    found, expected = both(tensors, threshold=0.7)
    compare(found, expected, 0.7)
    assert found.probs.isfinite().all()
    tensors[5].zero_()
    found, _ = both(tensors)
    assert found.confidence.eq(1).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_valid_class_and_no_mixing_leave_the_prediction_bit_for_bit(mode: tuple[Any, ...]) -> None:
    tensors = inputs(8, 10, 16, torch.float32)
    tensors[4][:] = False
    nothing_valid, expected = both(tensors, mode)
    compare(nothing_valid, expected)
    tensors[4][:] = True
    tensors[5][:] = 0
    no_weight, _ = both(tensors, mode)
    for a, b in zip(nothing_valid, no_weight, strict=True):
        assert torch.equal(a, b)


def test_clustered_prototypes_keep_their_digits() -> None:
    """Far from the origin and close together, where the expanded form of the distance fails in the second digit."""
    tensors = inputs(9, 10, 128, torch.float32)
    tensors[2] = 30 + 1e-3 * tensors[2]
    tensors[3] = 30 + 1e-3 * tensors[3]
    compare(*both(tensors, prototype_temperature=1e-3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_row_that_is_not_finite_has_a_label_and_no_mask_of_its_own(bad: int, mode: tuple[Any, ...]) -> None:
    """Labels index tables: they must lie in range also in the step before the run stops."""
    tensors = inputs(9, 10, 16, torch.float32)
    tensors[bad][3:6] = torch.nan
    found, expected = both(tensors, mode)
    for labels in (found.label, found.adjusted_label):
        assert labels.min() >= 0
        assert labels.max() < 10
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.adjusted_mask, expected.adjusted_mask)
    assert found.counts.sum() == found.mask.sum()


def test_ties_go_to_the_lower_class() -> None:
    tensors = inputs(1, 10, 4, torch.float32)
    for at in (0, 5, 6):
        tensors[at].zero_()
    found, _ = both(tensors)
    assert found.label.item() == found.adjusted_label.item() == 0


def test_opcheck_and_compile() -> None:
    arguments = (*inputs(3, 10, 5, torch.float32), 0.5, 2.0, *DEFAULT)
    torch.library.opcheck(kernel.pseudo_label, arguments)
    found = torch.compile(lambda: kernel.pseudo_label(*arguments), fullgraph=True, backend="aot_eager")()
    assert all(torch.equal(a, b) for a, b in zip(found, kernel.pseudo_label(*arguments), strict=True))


@pytest.mark.timeout(300)
def test_spills_no_register() -> None:
    pointers = {f"{name}_ptr": "*fp32" for name in ("logits", "balanced_logits", "queries", "prototypes")}
    pointers |= {"valid_ptr": "*i1", "mixing_ptr": "*fp32", "adjustment_ptr": "*fp32"}
    pointers |= {"hardness_scale_ptr": "*fp32", "label_ptr": "*i64", "confidence_ptr": "*fp32", "mask_ptr": "*i1"}
    pointers |= {"hardness_ptr": "*fp32", "adjusted_label_ptr": "*i64", "adjusted_mask_ptr": "*i1"}
    pointers |= {"probs_ptr": "*fp32", "counts_ptr": "*i64", "classes": "i32", "width": "i32"}
    pointers |= dict.fromkeys(("threshold", "prototype_temperature", "log_classes"), "fp32")
    flags = dict.fromkeys(("RENORMALIZE", "OR_MIXED_MASK", "MIXED_ENTROPY", "OR_BALANCED"), True)
    cases = []
    for classes, width in ((127, 2048), (1000, 128), (LARGEST["pseudo_label"], 128)):
        constants = kernel.launch_options(classes, width) | flags
        warps = constants.pop("num_warps")
        signature = pointers | dict.fromkeys(constants, "constexpr")
        cases.append({"signature": signature, "constants": constants, "num_warps": warps})
    found = compile_offline("semi_fast.ops.pseudo_label.kernel", "pseudo_label_kernel", cases)
    assert len(found) == 6
    assert all(case["spills"] == 0 for case in found), found


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, lambda x: x[:, :-1], r"balanced_logits must have shape \[3, 4\]; got \[3, 5\]"),
        (2, lambda x: x.long(), "queries must be float16 or .* got int64"),
        (4, lambda x: x.float(), "valid must be bool; got float32"),
        (6, lambda x: x[:-1], r"adjustment must have shape \[5\]; got \[4\]"),
        (7, lambda x: x[None], r"hardness_scale must have shape \[\]; got \[1\]"),
        (3, lambda x: x.to("meta"), "prototypes must be on"),
    ],
)
def test_wrong_inputs_are_named(at: int, change: Any, message: str) -> None:
    tensors = inputs(3, 5, 4, torch.float32)
    tensors[at] = change(tensors[at])
    with pytest.raises(ValueError, match=message):
        pseudo_label(*tensors, threshold=0.7, prototype_temperature=0.1)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="mask_source must be one of or, linear; got both"):
        pseudo_label(*inputs(3, 5, 4, torch.float32), threshold=0.7, prototype_temperature=0.1, mask_source="both")  # type: ignore[arg-type]
