"""What is too large for a kernel's block goes to the reference; the rest goes to the kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor

from semi_fast.ops import bank_push, embedding_align, masked_cross_entropy, pseudo_label
from semi_fast.ops.door import LARGEST
from tests.conftest import DEVICE
from tests.kernels import test_bank_push_kernel, test_pseudo_label_kernel


def call_pseudo_label(classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    drawn = test_pseudo_label_kernel.inputs(2, classes, 5, torch.float32)
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in drawn]
    return pseudo_label.pseudo_label(*tensors, threshold=0.5, prototype_temperature=2.0)


def call_masked_cross_entropy(classes: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    logits, target = torch.randn(4, classes).to(DEVICE, dtype), torch.tensor([classes - 1, 0], device=DEVICE)
    return (masked_cross_entropy.masked_cross_entropy(logits, target),)


def call_embedding_align(width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    weak, strong, center = (torch.randn(*n, width).to(DEVICE, dtype) for n in ((2,), (4,), ()))
    options = {"temperature": 0.5, "teacher_temperature": 0.5}
    return embedding_align.embedding_align(weak, strong, center, torch.ones(2, device=DEVICE, dtype=dtype), **options)


def call_bank_push(slots: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    state = test_bank_push_kernel.empty(2, slots, 3, dtype)
    bank_push.bank_push(*state, *test_bank_push_kernel.offers(2, 3, 5, 0, dtype))
    return tuple(x.sort(dim=1).values for x in state[1:3])


CALLS: dict[str, Callable[[int, torch.dtype], tuple[Tensor, ...]]] = {
    "pseudo_label": call_pseudo_label,
    "masked_cross_entropy": call_masked_cross_entropy,
    "embedding_align": call_embedding_align,
    "bank_push": call_bank_push,
}


class LaunchedError(Exception):
    """Where the kernel would have run."""


@pytest.mark.parametrize("name", CALLS)
def test_what_is_too_large_for_a_kernel_goes_to_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, kernel = import_module(f"semi_fast.ops.{name}"), import_module(f"semi_fast.ops.{name}.kernel")

    def launched(*_: object) -> None:
        raise LaunchedError

    monkeypatch.setattr(kernel, name, launched)
    monkeypatch.setattr(operation, "has_kernel", lambda device: True)
    with pytest.raises(LaunchedError):
        CALLS[name](LARGEST[name], torch.float32)
    for entries in (LARGEST[name] + 1, 2 * LARGEST[name]):
        found, expected = (CALLS[name](entries, dtype) for dtype in (torch.float32, torch.float64))
        for mine, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, exact.to(mine.dtype), rtol=1e-5, atol=1e-6)
