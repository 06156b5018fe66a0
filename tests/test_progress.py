"""How far a preparation is: said beside the blocks, which pass unchanged and whose reader is always closed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from semi_fast.data_prep import progress
from semi_fast.data_prep.progress import watched
from semi_fast.data_prep.readers import Raw


def raw_of(closed: list[bool]) -> Raw:
    """Three blocks of two images; says when its reader is closed."""

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        try:
            for i in range(3):
                yield "train", np.full((2, 4, 4, 3), i, np.uint8)
        finally:
            closed.append(True)

    labels = {"train": np.zeros(6, np.int64), "test": np.zeros(0, np.int64)}
    return Raw("cats", ("a", "b"), (4, 4), labels, 0, blocks(), {})


@pytest.mark.parametrize("terminal", [False, True])
def test_blocks_pass_and_the_reader_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    closed: list[bool] = []
    with watched(raw_of(closed)) as blocks:
        assert [int(block[0, 0, 0, 0]) for _, block in blocks] == [0, 1, 2]
    assert closed == [True]
    printed = capsys.readouterr()
    assert ("cats" in printed.err) == terminal, "quick work says nothing off a terminal"
    assert printed.out == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reader_is_closed_when_the_work_ends_early(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    closed: list[bool] = []

    def work() -> None:
        with watched(raw_of(closed)) as blocks:
            next(blocks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert closed == [True]


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with watched(raw_of([])) as blocks:
        list(blocks)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["cats: 4 of 6 images"]


def test_blocks_in_a_list_need_no_closing() -> None:
    raw = raw_of([])
    listed = Raw("cats", raw.class_names, raw.resolution, raw.labels, 0, iter(list(raw.blocks)), {})
    with watched(listed) as blocks:
        assert len(list(blocks)) == 3
