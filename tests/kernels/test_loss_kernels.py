"""The kernels of the two losses against their references in float64: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from semi_fast.ops.door import LARGEST
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.embedding_align import kernel as align_kernel
from semi_fast.ops.embedding_align import reference as align_reference
from semi_fast.ops.masked_cross_entropy import kernel as entropy_kernel
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.masked_cross_entropy import reference as entropy_reference
from tests.conftest import DEVICE
from tests.offline import compile_offline

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN rows

# Of a loss and of a gradient. In float32 a GPU's is that of exponentials of up to 400 by an approximate instruction. A
# gradient in half precision is rounded to it twice: when it is made, and times the upstream gradient. Triton's
# interpreter cuts bfloat16 off instead, which costs twice as much.
VALUE = 1e-5 if DEVICE.type == "cuda" else 2e-6
ROUNDING = {
    torch.float32: 5e-5 if DEVICE.type == "cuda" else 4e-6,
    torch.bfloat16: 3 * 2**-8,
    torch.float16: 2 * 2**-11,
}
SIZES = [(1, 1, 2), (8, 4, 10), (6, 3, 100), (4, 2, 127), (6, 6, 1000), (4, 2, 4096)]


def gradients(loss: Tensor, leaf: Tensor) -> Tensor:
    (3 * loss).backward()
    assert leaf.grad is not None
    return leaf.grad


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, unit: float) -> None:
    """A gradient is the difference of two terms of size `unit`: what float32 loses there is absolute."""
    atol = 1e-6 * unit + (1e-7 if dtype == torch.float16 else 0)  # and float16 has subnormal numbers
    torch.testing.assert_close(found.double(), expected, rtol=ROUNDING[dtype], atol=atol)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("extras", ["coefficient", "offset", "both"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "images", "classes"), SIZES)
def test_cross_entropy(rows: int, images: int, classes: int, dtype: torch.dtype, soft: bool, extras: str) -> None:
    torch.manual_seed(classes)
    logits = (5 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    logits[0] = 1000 * torch.eye(classes, device=DEVICE)[0]  # saturated
    target = torch.rand(images, classes, device=DEVICE) if soft else torch.randint(classes, (images,), device=DEVICE)
    coefficient = torch.rand(images, device=DEVICE) if extras != "offset" else None
    offset = torch.randn(classes, device=DEVICE) if extras != "coefficient" else None
    if coefficient is not None and images > 1:
        coefficient[-1] = 0
        logits[images - 1] = torch.nan  # a row that does not count is never read
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses, _ = entropy_kernel.masked_cross_entropy(ours, target, coefficient, offset)
    wide = target.double() if soft else target
    expected = entropy_reference.masked_cross_entropy(
        exact, wide, coefficient, None if offset is None else offset.double()
    )
    torch.testing.assert_close(losses.sum().double(), expected, rtol=VALUE, atol=1e-7)
    unit = 3 / rows * (classes if soft else 1)
    close(gradients(losses.sum(), ours), gradients(expected, exact), dtype, unit)
    if coefficient is not None and images > 1:
        assert ours.grad is not None
        assert ours.grad[images - 1].eq(0).all()


def test_cross_entropy_of_an_empty_mask_is_zero() -> None:
    logits = torch.full((6, 5), torch.inf, device=DEVICE, requires_grad=True)
    zero, target = torch.zeros(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    losses, _ = entropy_kernel.masked_cross_entropy(logits, target, zero, None)
    assert losses.eq(0).all()
    assert gradients(losses.sum(), logits).eq(0).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("rows", "images", "width"), [*SIZES, (4, 2, 2048)])
def test_alignment(rows: int, images: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    weak, strong = (torch.randn(n, width, device=DEVICE).to(dtype) for n in (images, rows))
    coefficient, center = torch.rand(images, device=DEVICE), 0.01 * torch.randn(width, device=DEVICE)
    if images > 1:
        coefficient[-1] = 0
        strong[images - 1] = torch.nan
    ours, exact = strong.clone().requires_grad_(), strong.double().requires_grad_()
    losses, target, _ = align_kernel.embedding_align(weak, ours, center, coefficient, 0.09, 0.018)
    double = weak.double(), exact, center.double(), coefficient.double()
    expected, expected_target = align_reference.embedding_align(*double, temperature=0.09, teacher_temperature=0.018)
    torch.testing.assert_close(losses.sum().double(), expected, rtol=VALUE, atol=1e-7)
    torch.testing.assert_close(target.double(), expected_target, rtol=5e-5, atol=1e-6)  # exponents up to 400 in float32
    close(gradients(losses.sum(), ours), gradients(expected, exact), dtype, 3 / rows / 0.09)


def entropy_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    drawn = torch.randint(5, (3,)), torch.rand(3), torch.randn(5)
    return (logits, *(x.to(DEVICE) for x in drawn))  # type: ignore[return-value]


def test_opcheck_and_compile() -> None:
    torch.manual_seed(0)
    torch.library.opcheck(entropy_kernel.masked_cross_entropy, entropy_inputs())
    strong = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    others = torch.randn(2, 8), torch.zeros(8), torch.rand(2)
    weak, center, coefficient = (x.to(DEVICE) for x in others)
    torch.library.opcheck(align_kernel.embedding_align, (weak, strong, center, coefficient, 0.09, 0.018))

    def program(logits: Tensor, *rest: Tensor) -> Tensor:
        return entropy_kernel.masked_cross_entropy(2 * logits, *rest)[0].sum()

    logits, *rest = entropy_inputs()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(logits, *rest), logits)
    (expected,) = torch.autograd.grad(program(logits, *rest), logits)
    assert torch.equal(found, expected)


@pytest.mark.timeout(300)
def test_spill_no_register() -> None:
    names = ("logits_ptr", "coefficient_ptr", "offset_ptr", "losses_ptr", "gradient_ptr")
    cases = []
    for classes, soft in ((127, False), (1000, True), (LARGEST["masked_cross_entropy"], True)):
        constants: dict[str, Any] = entropy_kernel.launch_options(classes)
        warps = constants.pop("num_warps")
        constants |= {"SOFT": soft, "WEIGHTED": True, "OFFSET": True}
        signature = dict.fromkeys(names, "*fp32") | {"target_ptr": "*fp32" if soft else "*i64"}
        signature |= dict.fromkeys(("rows", "images", "classes"), "i32") | dict.fromkeys(constants, "constexpr")
        cases.append({"signature": signature, "constants": constants, "num_warps": warps})
    found = compile_offline("semi_fast.ops.masked_cross_entropy.kernel", "cross_entropy_kernel", cases)
    cases = []
    for width in (128, 2048, LARGEST["embedding_align"]):
        constants = align_kernel.launch_options(width)
        warps = constants.pop("num_warps")
        names = ("weak", "strong", "center", "coefficient", "losses", "target", "gradient")
        signature = {f"{name}_ptr": "*fp32" for name in names} | dict.fromkeys(("rows", "images", "width"), "i32")
        signature |= dict.fromkeys(("temperature", "teacher_temperature"), "fp32") | {"BLOCK_D": "constexpr"}
        cases.append({"signature": signature, "constants": constants, "num_warps": warps})
    found += compile_offline("semi_fast.ops.embedding_align.kernel", "align_kernel", cases)
    assert [case["spills"] for case in found] == [0] * 12, found


def test_wrong_inputs_are_named() -> None:
    logits, target, coefficient, offset = entropy_inputs()
    with pytest.raises(ValueError, match="target must have a number of rows that divides the 6 of logits; got 4"):
        masked_cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=DEVICE), coefficient)
    with pytest.raises(ValueError, match=r"coefficient must have shape \[3\]; got \[6\]"):
        masked_cross_entropy(logits, target, torch.ones(6, device=DEVICE))
    with pytest.raises(ValueError, match="target must be int64; got int32"):
        masked_cross_entropy(logits, target.int(), coefficient)
    with pytest.raises(ValueError, match=r"offset must have shape \[5\]; got \[4\]"):
        masked_cross_entropy(logits, target, coefficient, offset[:-1])
    weak, strong = torch.zeros(2, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    options = {"temperature": 0.1, "teacher_temperature": 0.02}
    with pytest.raises(ValueError, match=r"center must have shape \[4\]; got \[3\]"):
        embedding_align(weak, strong, torch.zeros(3, device=DEVICE), torch.ones(2, device=DEVICE), **options)
    with pytest.raises(ValueError, match=r"weak must have shape \[any, 4\]; got \[2, 3\]"):
        embedding_align(weak[:, :3], strong, torch.zeros(4, device=DEVICE), torch.ones(2, device=DEVICE), **options)
    with pytest.raises(ValueError, match=r"logits must have shape \[any, any\]; got \[6\]"):
        masked_cross_entropy(logits[:, 0], target)
    with pytest.raises(ValueError, match=r"target must have shape \[any\]; got \[\]"):
        masked_cross_entropy(logits, target[0])
    with pytest.raises(ValueError, match=r"strong must have shape \[any, any\]; got \[4\]"):
        embedding_align(weak, strong[:, 0], torch.zeros(4, device=DEVICE), torch.ones(2, device=DEVICE), **options)
    with pytest.raises(ValueError, match="coefficient must be on"):
        embedding_align(weak, strong, torch.zeros(4, device=DEVICE), torch.ones(2, device="meta"), **options)
