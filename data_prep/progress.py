"""How far a preparation is: a bar on a terminal, elsewhere a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from semi_fast.data_prep.readers import Raw

LINE_SECONDS = 30

Blocks = Generator[tuple[str, np.ndarray], None, None]


@contextmanager
def watched(raw: Raw) -> Iterator[Blocks]:
    """The blocks of `raw`, counted as they pass; at the end the reader is closed, and with it what it has started."""
    total = sum(map(len, raw.labels.values())) + raw.num_unlabeled
    blocks = _with_bar(raw, total) if sys.stderr.isatty() else _with_lines(raw, total)
    try:
        yield blocks
    finally:
        blocks.close()
        close = getattr(raw.blocks, "close", None)  # of a generator
        if close is not None:
            close()


def _with_bar(raw: Raw, total: int) -> Blocks:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(raw.dataset, total=total)
        for part, block in raw.blocks:
            yield part, block
            progress.advance(task, len(block))


def _with_lines(raw: Raw, total: int) -> Blocks:
    done, last = 0, time.monotonic()
    for part, block in raw.blocks:
        yield part, block
        done += len(block)
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            print(f"{raw.dataset}: {done} of {total} images", file=sys.stderr, flush=True)
