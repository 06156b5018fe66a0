"""Who is seen when: every sample once per visit, the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.loop.sampling import Batches, DeviceBatches, Stream
from semi_fast.philox import ORDER_LABELED, ORDER_UNLABELED

LABELED, UNLABELED = np.arange(0, 70, 5), np.arange(3, 60)


def batches(**processes: int) -> Batches:
    return Batches(LABELED, UNLABELED, seed=5, labeled_rows=8, unlabeled_rows=16, **processes)


@settings(max_examples=50)
@given(
    st.sets(st.integers(0, 500), min_size=1, max_size=40),
    st.integers(0, 2**64 - 1),
    st.integers(0, 200),
    st.integers(1, 90),
)
def test_any_stretch_of_a_stream_is_that_of_the_whole(ids: set[int], seed: int, start: int, count: int) -> None:
    stream = Stream(np.array(sorted(ids)), seed=seed, stream=ORDER_LABELED)
    whole = stream.take(0, start + count)
    part = stream.take(start, count)
    assert part.ids.tolist() == whole.ids[start:].tolist()
    assert part.visits.tolist() == whole.visits[start:].tolist()
    for visit in range((start + count) // len(ids)):
        assert sorted(whole.ids[whole.visits == visit].tolist()) == sorted(ids), "each visit is the whole set"


def test_visits_have_orders_of_their_own_and_wrap_inside_a_batch() -> None:
    stream = Stream(LABELED, seed=0, stream=ORDER_LABELED)
    drawn = stream.take(0, 3 * len(LABELED))
    orders = drawn.ids.reshape(3, -1).tolist()
    assert len({tuple(order) for order in orders}) == 3
    small = Stream(np.array([4, 9]), seed=0, stream=ORDER_LABELED).take(0, 8)
    assert small.visits.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(small.ids.tolist()) == [4] * 4 + [9] * 4


def test_streams_differ() -> None:
    ids = np.arange(50)
    one, other = (Stream(ids, seed=0, stream=s).take(0, 50).ids.tolist() for s in (ORDER_LABELED, ORDER_UNLABELED))
    assert one != other


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_tile_the_batch_of_one(processes: int) -> None:
    for step in (0, 3, 11):
        labeled, unlabeled = batches().whole(step)
        shares = [batches(rank=r, processes=processes).share(step) for r in range(processes)]
        b, u = 8 // processes, 16 // processes
        assert np.concatenate([s.ids[:b] for s in shares]).tolist() == labeled.ids.tolist()
        assert np.concatenate([s.ids[b:] for s in shares]).tolist() == unlabeled.ids.tolist()
        assert all(len(s.ids) == b + u for s in shares)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch\.labeled must be divisible .* 8 and 3"):
        batches(rank=0, processes=3)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Stream(np.array([], dtype=np.int64), seed=0, stream=ORDER_LABELED)


@settings(max_examples=30)
@given(
    st.integers(1, 60),
    st.integers(1, 200),
    st.integers(1, 30),
    st.integers(1, 40),
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
    st.integers(0, 2**64 - 1),
)
def test_the_device_draws_what_the_host_does(
    labeled: int, unlabeled: int, labeled_rows: int, unlabeled_rows: int, steps: list[int], seed: int
) -> None:
    """From any step to any other; sets smaller than a batch come round several times in a step."""
    processes = 2 if labeled_rows % 2 == 0 and unlabeled_rows % 2 == 0 else 1
    host = Batches(
        np.arange(labeled) * 3,
        np.arange(unlabeled) + 7,
        seed=seed,
        labeled_rows=labeled_rows,
        unlabeled_rows=unlabeled_rows,
        rank=processes - 1,
        processes=processes,
    )
    device = DeviceBatches(host, torch.device("cpu"))
    ids = device.share(torch.tensor(steps[0]))[0].tolist()
    assert {*ids[: labeled_rows // processes]} <= {*range(0, 3 * labeled, 3)}, "samples of the stream, before any order"
    for step in [*steps, *range(steps[0], steps[0] + 40)]:
        device.renew(step)
        ids, visits = device.share(torch.tensor(step))
        expected = host.share(step)
        assert ids.tolist() == expected.ids.tolist()
        assert visits.tolist() == expected.visits.tolist()
