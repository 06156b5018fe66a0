"""The published known-answer vectors, in numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semi_fast.philox import below, philox, shuffled

# Random123's kat_vectors for philox4x32-10: key, counter, words.
KNOWN = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0xA4093822 | 0x299F31D0 << 32,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    in_numpy = philox(key, tuple(np.array([c]) for c in counter))  # type: ignore[arg-type]
    in_torch = philox(key, tuple(torch.tensor([c]) for c in counter))  # type: ignore[arg-type]
    assert tuple(int(w[0]) for w in in_numpy) == words
    assert tuple(int(w[0]) for w in in_torch) == words


def test_below_is_the_high_part_of_the_product() -> None:
    word = np.array([0, 2**31, 2**32 - 1])
    assert below(word, 14).tolist() == [0, 7, 13]


def test_an_order_is_a_permutation_that_depends_on_every_key() -> None:
    ids = np.arange(100, 200)
    orders = [shuffled(ids, *key).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(sorted(order) == ids.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    subset = shuffled(ids[::2], 0, 0, 0).tolist()
    assert subset == [i for i in orders[0] if i % 2 == 0], "who is ahead of whom does not depend on the others"
