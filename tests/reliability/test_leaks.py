"""Sources that are opened, read a little and dropped, over and over: memory, threads and files stay as they are."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from semi_fast.data_prep.formats import Formats
from semi_fast.data_prep.prepare import prepare_digits
from semi_fast.loop.sampling import Batches
from semi_fast.pipelines import source
from semi_fast.pipelines.source import open_source
from semi_fast.prepared.manifest import Manifest
from tests.conftest import PATIENCE
from tests.libraries import needs
from tests.reliability.figures import amount, record
from tests.reliability.forked import forked

CPU = torch.device("cpu")
GROWTH_BYTES = 20 * 2**20
WARM_EPOCHS = 60
"""Until allocators, caches and compilers have what they keep."""
LABELED_ROWS, UNLABELED_ROWS = 16, 112


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The digits in every format, at a resolution at which one source that stays would show."""
    out = tmp_path_factory.mktemp("data") / "digits"
    return prepare_digits(out, 32, Formats(("resident", "ffcv", "dali"), "png"))


@pytest.fixture
def order(manifest: Manifest) -> Callable[[int], np.ndarray]:
    every = np.arange(manifest.length("train"))
    batches = Batches(every[:100], every, seed=0, labeled_rows=LABELED_ROWS, unlabeled_rows=UNLABELED_ROWS)
    return lambda step: batches.share(step).ids


def held() -> tuple[int, int, int]:
    """Threads, file descriptors, and resident bytes of this process that no file backs: after a fork the pages of
    libraries become resident again as they are touched."""
    task, descriptors = (len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd"))
    (kibibytes,) = re.findall(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return task, descriptors, int(kibibytes) * 1024


def settled() -> tuple[int, int, int]:
    """`held`, once threads that were told to end have done so."""
    gc.collect()
    patience, counts = time.monotonic() + PATIENCE, [held()]
    while len(counts) < 10 or (len({count[0] for count in counts[-10:]}) > 1 and time.monotonic() < patience):
        time.sleep(0.03)
        counts.append(held())
    return counts[-1]


def epoch(name: str, manifest: Manifest, order: Callable[[int], np.ndarray], number: int) -> None:
    """A source that is opened and read; by turns it is closed, dropped, or given up in the middle of an error."""
    out = torch.empty(LABELED_ROWS + UNLABELED_ROWS, *manifest.resolution, 3, dtype=torch.uint8)
    rows = open_source(name, manifest, CPU, order, threads=2)
    for step in (number, number + 1, number + 7):  # the last is not the one that was read ahead
        rows.fetch(step, out)
    if number % 3 == 0:
        rows.close()
    elif number % 3 == 1:
        try:
            with closing(rows):
                raise InterruptedError
        except InterruptedError:
            pass


SOURCES = ["read ahead", "resident", "ffcv", "dali"]


@pytest.mark.parametrize("name", SOURCES)
def test_abandoned_sources_leave_nothing(
    name: str, manifest: Manifest, order: Callable[[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("ffcv", "dali"):
        needs(name)
    if name == "ffcv":
        from semi_fast.pipelines import ffcv

        monkeypatch.setattr(ffcv, "new_loader", cache(ffcv.new_loader))  # each compiles its own loops, a second long
    if name == "read ahead":
        monkeypatch.setattr(source, "FITS", 0.0)
    kind = "resident" if name == "read ahead" else name
    epochs, began = amount(60, 300), time.monotonic()

    def child() -> None:
        for number in range(WARM_EPOCHS):
            epoch(kind, manifest, order, number)
        before = settled()
        for number in range(epochs):
            epoch(kind, manifest, order, number)
        after = settled()
        print("held", *before, *after)

    end = forked(child, seconds=PATIENCE + epochs)
    assert end.code == 0, end.output
    numbers = [int(number) for number in end.output.split("held ")[1].split()]
    threads, descriptors, size = (numbers[3 + i] - numbers[i] for i in range(3))
    record(
        f"abandoned sources, {name}", made=epochs, failures=int(threads > 0) + int(descriptors > 0)
        + int(size >= GROWTH_BYTES), goal="300 epochs: under 20 MB more, no thread or file more",
        seconds=time.monotonic() - began, note=f"{size / 2**20:+.1f} MiB, {threads:+d} threads, {descriptors:+d} files",
    )  # fmt: skip
    assert threads <= 0, numbers
    assert descriptors <= 0, numbers
    assert size < GROWTH_BYTES, numbers
