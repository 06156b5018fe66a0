"""Philox4x32-10: random words as a pure function of (key, counter), with the same bits in numpy and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", "np.ndarray", "Tensor")

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

# Streams: the first counter word. A number is never given a second meaning; a new use takes a new one.
ORDER_LABELED, ORDER_UNLABELED, AUGMENT_LABELED, AUGMENT_UNLABELED, SPLIT, BANK_SAMPLING, FILE_ORDER = range(7)


def philox(seed: int, counter: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    """Four 32-bit words per counter, held in int64 [...] arrays of the counter's kind and (broadcast) shape.

    `seed` is the 64-bit key, each counter word an int64 array in [0, 2**32). The 64-bit products wrap around in int64,
    which keeps their bits. Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def below(word: Array, n: int) -> Array:
    """A 32-bit word as an integer in [0, n): `(word * n) >> 32`, for n < 2**31."""
    return (word * n) >> 32


def shuffled(ids: np.ndarray, seed: int, stream: int, visit: int) -> np.ndarray:
    """`ids` (int64 [n]) in the order of their Philox words for (stream, visit), ties by id."""
    full = np.full_like
    words = philox(seed, (full(ids, stream), full(ids, visit), ids, full(ids, 0)))[0]
    return ids[np.lexsort((ids, words))]
