"""FFCV's Loader as rows by step: decoded ahead by its own thread, from files that are checked before it maps them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import Empty, Full, SimpleQueue
from typing import Any

import numpy as np
import torch

from semi_fast.prepared.beton import Beton, beton_file, open_beton
from semi_fast.prepared.manifest import Manifest, check_container

STEPS_AHEAD = 16
"""Steps whose sample ids FFCV has been told."""
BATCHES_AHEAD = 2
"""Batches that wait in each thread; two more are being made and being read."""
MOST_THREADS = 8
"""For each file; more would have nothing to do."""
TIMEOUT_SECONDS = 90.0
"""For one batch; the first of a file waits for numba's compiler."""
ENDING_SECONDS = 5.0
INSTALL = (
    "`apt-get install libturbojpeg0-dev libopencv-dev pkg-config g++` (what FFCV is built with), "
    "then `pip install 'semi-fast[ffcv]'`"
)


class FfcvRows:
    """The rows of each step from `train.beton` and `unlabeled.beton`; see `host.HostRows`."""

    def __init__(self, manifest: Manifest, order: Callable[[int], np.ndarray], *, threads: int) -> None:
        """Step t reads the sample ids `order(t)`, int64 [n], equally many in every step; it is asked ahead.

        `threads` decode each file, at most 8. ValueError for files that are not what the manifest says, RuntimeError if
        FFCV is missing.
        """
        if threads < 1:
            raise ValueError(f"data.threads must be at least 1; got {threads}")
        ffcv_library()  # told before the files are hashed
        files = [open_part(manifest, part) for part in ("train", "unlabeled") if manifest.length(part)]
        self.order, self.samples = order, sum(len(file.ids) for file in files)
        self.shape = (len(order(0)), *manifest.resolution, 3)
        self.feeds = [Feed(file, self.shape[0], threads=threads) for file in files]
        self.step = 0
        self.ahead: deque[np.ndarray] = deque()  # sample ids of self.step and the steps behind it
        self._end = weakref.finalize(self, end_all, self.feeds)  # also when dropped, and before the interpreter exits

    def fetch(self, step: int) -> np.ndarray:
        """uint8 [n, H, W, 3] of `order(step)`, a new array; any step, at once for the one after the last.

        RuntimeError for what goes wrong in FFCV, in its threads too; everything is closed then.
        """
        if not self._end.alive:
            raise RuntimeError("data.source=ffcv is closed: it failed before, or the run has ended")
        try:
            while self.ahead and step != self.step:
                self._take_next()
            self.step = step
            while len(self.ahead) < STEPS_AHEAD:
                self._order_next()
            return self._take_next()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads."""
        self._end()

    def _order_next(self) -> None:
        step = self.step + len(self.ahead)
        ids = np.asarray(self.order(step), np.int64)
        if ids.shape != self.shape[:1]:
            raise ValueError(f"every step must read {self.shape[0]} samples; step {step} has ids {ids.shape}")
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.samples):  # FFCV checks no bounds
            raise ValueError(f"sample ids must lie in 0..{self.samples - 1}; got {ids.min()}..{ids.max()}")
        self.ahead.append(ids)
        for feed in self.feeds:
            feed.order(ids[feed.holds(ids)])

    def _take_next(self) -> np.ndarray:
        rows, ids = np.empty(self.shape, np.uint8), self.ahead.popleft()
        for feed in self.feeds:
            feed.take(rows, np.flatnonzero(feed.holds(ids)))
        self.step += 1
        return rows


class Feed:
    """The images of one file in any order, decoded ahead."""

    def __init__(self, file: Beton, batch_rows: int, *, threads: int) -> None:
        self.file = file
        self.first, self.last = int(file.ids[0]), int(file.ids[-1])
        self.loader = new_loader(file.path, max(1, batch_rows))
        self.threads = min(threads, MOST_THREADS)
        self.epochs: deque[Any] = deque()  # batches go round: the leftmost gets the next order
        self.waiting: deque[tuple[Any, np.ndarray]] = deque()  # epoch and sample ids of what was ordered and not taken

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: which sample ids are in this file."""
        return (self.first <= ids) & (ids <= self.last)

    def order(self, ids: np.ndarray) -> None:
        """Begin to decode a batch, int64 [m] sample ids of this file, behind those ordered before."""
        if not len(ids):
            return
        while len(self.epochs) < self.threads:
            self.epochs.append(epoch_class()(self.loader))
        self.epochs[0].orders.put(ids - self.first)
        self.waiting.append((self.epochs[0], ids))
        self.epochs.rotate(-1)

    def take(self, out: np.ndarray, at: np.ndarray) -> None:
        """Copy the next batch into the rows `at`, int64 [m], of `out`; none for m = 0."""
        if not len(at):
            return
        epoch, ids = self.waiting.popleft()
        try:
            result = epoch.output_queue.get(timeout=TIMEOUT_SECONDS)
        except Empty:
            raise RuntimeError(f"FFCV gave no rows of {self.file.path} within {TIMEOUT_SECONDS:g} s") from None
        if isinstance(result, BaseException):
            raise RuntimeError(f"FFCV failed on {self.file.path}: {result!r}") from result
        images, index = result
        if not np.array_equal(index[:, 0], ids):
            raise RuntimeError(f"FFCV gave other rows of {self.file.path} than were ordered")
        out[at] = images  # which are in a ring: overwritten some batches later

    def end(self) -> None:
        """End the threads that decode, and forget what was ordered."""
        for epoch in self.epochs:
            epoch.terminate_event.set()
        while self.epochs:
            self.epochs.popleft().end()
        self.waiting.clear()


def end_all(feeds: list[Feed]) -> None:
    for feed in feeds:
        feed.end()


def open_part(manifest: Manifest, part: str) -> Beton:
    """The .beton file of a part, its digest and structure checked; ValueError if it is not what the manifest says."""
    name = beton_file(part)
    if name not in manifest.containers:
        raise ValueError(f"{manifest.root} has no {name}: prepare it with the format ffcv")
    file = open_beton(check_container(manifest, name))
    first = manifest.length("train") if part == "unlabeled" else 0
    labels = np.full(len(file.labels), -1) if part == "unlabeled" else manifest.labels(part)
    expected = manifest.resolution, np.arange(first, first + manifest.length(part)), labels
    found = file.resolution, file.ids, file.labels
    if not all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)):
        raise ValueError(f"{file.path}: resolution, sample ids or labels differ from the manifest's; prepare again")
    return file


def read_part(manifest: Manifest, part: str, rows: np.ndarray | None = None) -> np.ndarray:
    """uint8 [n, H, W, 3] of a part, or of some of its rows, from its verified file; needs no FFCV."""
    if not manifest.length(part):
        return np.zeros((0, *manifest.resolution, 3), np.uint8)
    return open_part(manifest, part).images(rows)


def ffcv_library() -> Any:
    """FFCV; torch keeps its number of threads, which FFCV sets to one. RuntimeError says how to get it."""
    threads = torch.get_num_threads()
    try:
        import ffcv.loader  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise RuntimeError(
            f"data.source=ffcv needs FFCV, which cannot be imported ({' '.join(str(error).split())}): {INSTALL}"
        ) from error
    finally:
        torch.set_num_threads(threads)
    return ffcv


def new_loader(path: Path, batch_rows: int) -> Any:
    """FFCV's Loader of a checked file, giving images and sample ids.

    Its loops are plain: of numba's layers for parallel ones `workqueue` ends the process when two threads enter one,
    as those of two files do, and `tbb` loses 7 kB of memory in every one. Whole batches are what runs in parallel.
    """
    ffcv, torch_threads = ffcv_library(), torch.get_num_threads()
    try:
        loader = ffcv.loader.Loader(
            str(path),
            batch_rows,
            num_workers=1,
            os_cache=True,
            order=ffcv.loader.OrderOption.SEQUENTIAL,  # not used: every epoch is given its order
            seed=0,  # None would draw from numpy's global generator
            batches_ahead=BATCHES_AHEAD,
            pipelines={
                "image": [ffcv.fields.rgb_image.SimpleRGBImageDecoder()],
                "label": None,
                "index": [ffcv.fields.basics.IntDecoder()],
            },
        )
    finally:
        torch.set_num_threads(torch_threads)  # the Loader sets it too
    manager = loader.memory_manager
    manager.ptr_to_size = manager.sample_to_pages = manager.page_to_samples = {}  # for orders and caches not in use
    return loader


@cache
def epoch_class() -> Any:
    """FFCV's EpochIterator with another loop.

    Its own one sets torch's number of threads, dies silently of any exception but StopIteration, so that whoever waits
    for a batch waits for ever, and can itself wait for ever when nobody takes its last batches.
    """
    epoch_iterator = ffcv_library().loader.epoch_iterator
    epoch_iterator.IS_CUDA = False  # nothing here is done on a GPU; the streams would be those of the first one

    class Epoch(epoch_iterator.EpochIterator):
        def __init__(self, loader: Any) -> None:
            self.orders: SimpleQueue[np.ndarray | None] = SimpleQueue()  # of row numbers; None ends
            super().__init__(loader, ())  # starts the thread

        def run(self) -> None:
            try:
                number = 0
                while (rows := self.orders.get()) is not None:
                    slot = number % (BATCHES_AHEAD + 2)  # one is being read, one made, the others wait
                    if not self._put(self.run_pipeline(number, rows, slot, None)):
                        return
                    number += 1
            except BaseException as error:  # noqa: BLE001, raised again where the batch is taken
                self._put(error)

        def _put(self, item: Any) -> bool:
            """Whether the item found room before the end."""
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=0.5)
                except Full:
                    continue
                return True
            return False

        def end(self) -> None:
            """Stop the thread and wait for it."""
            self.terminate_event.set()
            self.orders.put(None)
            while not self.output_queue.empty():
                self.output_queue.get_nowait()  # wakes a put that waits for room
            self.join(ENDING_SECONDS)  # one that hangs in a read cannot be ended; nobody waits for it, nor does exit

    return Epoch
