"""The drawing of the views: where a cutout begins, and what is refused."""

from __future__ import annotations

import pytest
import torch

from semi_fast.ops.draw_views import draw_views
from semi_fast.ops.draw_views.reference import cutout_start


@pytest.mark.parametrize("size", [0, 1, 7, 8, 16, 31])
def test_cutout_starts_where_the_rule_says(size: int) -> None:
    word = torch.tensor([0, 2**27 + 1, 2**31, 2**31 + 2**27 * 3, 2**32 - 1])
    centre = word.double() * 32 / 2**32
    expected = (centre - size / 2).clamp_min(0).floor().long()
    assert torch.equal(cutout_start(word, 32, size), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(5)}, "ids must be int64; got float32"),
        ({"ids": torch.zeros(4).long()}, r"ids must have shape \[5\]; got \[4\]"),
        ({"visits": torch.zeros(6).long()}, r"visits must have shape \[5\]; got \[6\]"),
        ({"visits": torch.zeros(5, device="meta").long()}, "visits must be on cpu; got meta"),
        ({"labeled": -1, "unlabeled": 6}, "labeled must be at least 0; got -1"),
        ({"strong_views": 2**16}, "strong_views must be at least 0 and at most 65534; got 65536"),
        ({"resolution": (0, 8)}, "resolution must be at least 1; got 0"),
        ({"pad": 8}, "pad must be at least 0 and at most 7; got 8"),
        ({"cutout": -1}, "cutout must be at least 0; got -1"),
        ({"operations": -1}, "operations must be at least 0 .*; got -1"),
    ],
)
def test_wrong_arguments_of_the_drawing_are_named(change: dict[str, object], message: str) -> None:
    ids = torch.arange(5)
    numbers = {"labeled": 2, "unlabeled": 3, "strong_views": 1, "seed": 0, "flip": True, "resolution": (8, 8)}
    good = {"ids": ids, "visits": ids, **numbers, "pad": 1, "cutout": 2, "operations": 2}
    assert draw_views(**good)[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        draw_views(**good | change)  # type: ignore[arg-type]
