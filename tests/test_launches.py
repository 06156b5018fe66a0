"""What a compiled step launches on a GPU, by the code that Inductor writes for one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.launches import METHODS, count, launches, table

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "launches.csv"


def recorded(method: str, model: str) -> dict[str, int]:
    with RESULTS.open(newline="") as file:
        rows = {(row["method"], row["model"], row["without"]): row for row in csv.DictReader(file)}
    return {kind: int(n) for kind, n in rows[method, model, ""].items() if kind in table({})}


BUDGET = 330
"""Of a step of SeMi with the published network, in bf16."""


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_no_step_launches_more_than_is_recorded() -> None:
    """Of a small model, which compiles soon. More is a decision: then `python -m benchmarks.launches` writes the file
    again."""
    found, budget = table(count(METHODS["semi"], "wrn_10_2").counts), recorded("semi", "wrn_10_2")
    assert {kind: n for kind, n in found.items() if n > budget[kind]} == {}
    assert found["step"] > 40, "three convolutions for each of ten layers alone are 29"


@pytest.mark.parametrize("method", METHODS)
def test_the_published_network_keeps_to_the_budget(method: str) -> None:
    assert 240 < recorded(method, "wrn_28_2")["step"] <= BUDGET


@pytest.mark.parametrize(
    ("call", "arguments", "number"),
    [
        ("extern_kernels.convolution", "", 1),
        ("torch.ops.aten.convolution_backward.default", "buf1, buf2, [0], [1, 1], [True, True, False])", 2),
        ("torch.ops.aten.convolution_backward.default", "buf1, buf2, [0], [1, 1], [False, True, False])", 1),
        ("torch.ops.semi_fast.rand_augment.default", "", 2),
        ("torch.ops.semi_fast.bank_push.default", "", 1),
        ("torch.ops.aten._foreach_norm.Scalar", "", 2),
        ("aten.index_put_", "", 11),
    ],
)
def test_what_a_call_counts(call: str, arguments: str, number: int) -> None:
    assert launches(call, arguments) == number
