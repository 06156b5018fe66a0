"""FFCV: its own Loader reads our files exactly, and its rows are the resident pixels in our order, whatever happens."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semi_fast.data_prep.formats import Formats
from semi_fast.data_prep.prepare import publish
from semi_fast.data_prep.readers import Raw
from semi_fast.loop.sampling import Batches
from semi_fast.pipelines import ffcv as pipeline
from semi_fast.pipelines.ffcv import STEPS_AHEAD, Feed, FfcvRows, ffcv_library
from semi_fast.prepared.beton import BetonFile, beton_file, open_beton
from semi_fast.prepared.manifest import Manifest

from .conftest import PATIENCE, SHARED

if importlib.util.find_spec("ffcv") is None and os.environ.get("CI") != "true":
    pytest.skip(f"FFCV is not installed: {pipeline.INSTALL}", allow_module_level=True)

LABELED_ROWS, UNLABELED_ROWS = 64, 128
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pool() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 32, 32, 3] and labels: CIFAR-10's training images where they are beside the repository, else noise."""
    unpack = SHARED / "data" / "unpack.py"
    if not unpack.exists():
        return np.random.default_rng(0).integers(0, 256, (9000, 32, 32, 3), np.uint8), np.arange(9000) % 10
    spec = importlib.util.spec_from_file_location("unpack", unpack)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, labels = module.read_strips(SHARED / "data" / "cifar10_lossless_webp.tar")[0]["train"]
    assert images.shape == (50_000, 32, 32, 3)
    return images, labels


@pytest.fixture(scope="module")
def manifest(pool: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A fifth of the pool is `train`, the rest `unlabeled`."""
    images, labels = pool
    n = len(images) // 5

    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        yield "train", images[:n]
        yield "test", images[:500]
        yield from (("unlabeled", images[i : i + 6000]) for i in range(n, len(images), 6000))

    raw = Raw(
        "synthetic", tuple("abcdefghij"), (32, 32), {"train": labels[:n], "test": labels[:500]}, len(images) - n,
        blocks(), {"reader": "synthetic", "name": "synthetic"},
    )  # fmt: skip
    out = tmp_path_factory.mktemp("data") / "data"
    return publish(lambda: raw, out, "synthetic", Formats(("resident", "ffcv")))


@pytest.fixture(scope="module")
def order(manifest: Manifest) -> Callable[[int], np.ndarray]:
    """Labeled from `train`; unlabeled from both files, a set that no batch divides."""
    n, total = manifest.length("train"), manifest.length("train") + manifest.length("unlabeled")
    labeled = np.random.default_rng(0).permutation(n)[: n // 7]
    batches = Batches(labeled, np.arange(total), seed=3, labeled_rows=LABELED_ROWS, unlabeled_rows=UNLABELED_ROWS)
    return lambda step: batches.share(step).ids


@pytest.fixture(scope="module")
def compiled() -> Callable[[Path, int], Any]:
    return cache(pipeline.new_loader)


@pytest.fixture
def kept_loaders(compiled: Callable[[Path, int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders of earlier tests are used again, as they take a second to compile; threads and rings are new."""
    monkeypatch.setattr(pipeline, "new_loader", compiled)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    patience = time.monotonic() + PATIENCE  # those of the official Writer's queues end by themselves
    while threading.active_count() > before and time.monotonic() < patience:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() <= before, threading.enumerate()


def official(path: Path, batch: int, threads: int = 1) -> Any:
    """FFCV's Loader of all three fields, as its documentation has it."""
    ffcv = ffcv_library()
    decoders = {
        "image": [ffcv.fields.rgb_image.SimpleRGBImageDecoder()],
        "label": [ffcv.fields.basics.IntDecoder()],
        "index": [ffcv.fields.basics.IntDecoder()],
    }
    order = ffcv.loader.OrderOption.SEQUENTIAL
    return ffcv.loader.Loader(
        str(path), batch, num_workers=threads, order=order, os_cache=True, drop_last=False, pipelines=decoders
    )


def read_whole(loader: Any) -> list[np.ndarray]:
    """Images, labels and ids, copied batch by batch; the thread has ended afterwards."""
    iterator = iter(loader)
    batches = [tuple(field.copy() for field in batch) for batch in iterator]
    iterator.join(10)
    return [np.concatenate(field) for field in zip(*batches, strict=True)]


@pytest.mark.parametrize("part", ["train", "test", "unlabeled"])
def test_the_official_loader_reads_the_parts(manifest: Manifest, part: str) -> None:
    images, labels, ids = read_whole(official(manifest.root / beton_file(part), 999))
    n, first = manifest.length(part), manifest.length("train") if part == "unlabeled" else 0
    assert np.array_equal(images, manifest.images(part))
    assert np.array_equal(labels[:, 0], np.full(n, -1) if first else manifest.labels(part))
    assert np.array_equal(ids[:, 0], first + np.arange(n))


@pytest.mark.parametrize(("height", "width", "rows"), [(1, 1, 9), (5, 7, 4), (96, 96, 400), (1700, 1700, 2)])
def test_the_official_loader_reads_any_size(tmp_path: Path, height: int, width: int, rows: int) -> None:
    expected = np.random.default_rng(0).integers(0, 256, (rows, height, width, 3), np.uint8)
    file = BetonFile(tmp_path / "a.beton", np.arange(rows) - 1, np.arange(rows) * 2**40, (height, width))
    file.write(expected)
    file.finish()
    file.close()
    images, labels, ids = read_whole(official(tmp_path / "a.beton", min(rows, 64)))
    assert np.array_equal(images, expected)
    assert np.array_equal(labels[:, 0], np.arange(rows) - 1)
    assert np.array_equal(ids[:, 0], np.arange(rows) * 2**40)


class Samples:
    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, int]:
        return self.images[row], -row, row


def test_files_of_the_official_writer_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes write, so the images of its file are in no order."""
    ffcv, path = ffcv_library(), tmp_path / "official.beton"
    monkeypatch.setattr(ffcv.writer.tqdm, "monitor_interval", 0)  # its thread would stay
    images = np.random.default_rng(0).integers(0, 256, (300, 9, 11, 3), np.uint8)
    fields = {
        "image": ffcv.fields.RGBImageField("raw"),
        "label": ffcv.fields.IntField(),
        "index": ffcv.fields.IntField(),
    }
    writer = ffcv.writer.DatasetWriter(str(path), fields, num_workers=2)
    writer.from_indexed_dataset(Samples(images), chunksize=20)
    file = open_beton(path)
    assert np.array_equal(file.images(), images)
    assert np.array_equal(file.labels, -np.arange(300))
    assert np.array_equal(file.ids, np.arange(300))


def resident(manifest: Manifest) -> np.ndarray:
    return np.concatenate([manifest.images("train"), manifest.images("unlabeled")])


def test_three_epochs_have_the_resident_pixels(manifest: Manifest, order: Callable[[int], np.ndarray]) -> None:
    expected = resident(manifest)
    steps = 3 * len(expected) // UNLABELED_ROWS + 1
    held: list[tuple[int, np.ndarray]] = []
    with closing(FfcvRows(manifest, order, threads=2)) as rows:
        for step in range(steps):
            fetched = rows.fetch(step)
            assert np.array_equal(fetched, expected[order(step)]), step
            held = [*held[-40:], (step, fetched)]
    for step, fetched in held:
        assert np.array_equal(fetched, expected[order(step)]), "never overwritten"
    seen = np.concatenate([order(step) for step in range(steps)])
    assert len(np.unique(seen)) == len(expected)


@pytest.mark.usefixtures("kept_loaders")
@pytest.mark.parametrize("threads", [1, 3])
def test_any_step_can_follow_any_other(manifest: Manifest, order: Callable[[int], np.ndarray], threads: int) -> None:
    expected = resident(manifest)
    jumps = np.random.default_rng(threads).integers(0, 100_000, 40).tolist()
    with closing(FfcvRows(manifest, order, threads=threads)) as rows:
        for step in (777, 778, 778, 0, 1, 2, STEPS_AHEAD, STEPS_AHEAD + 2, *jumps):
            assert np.array_equal(rows.fetch(step), expected[order(step)]), step


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.usefixtures("kept_loaders")
def test_abandoned_iterators_leave_neither_threads_nor_memory(manifest: Manifest) -> None:
    feed = Feed(open_beton(manifest.root / beton_file("train")), 192, threads=2)
    out, ids = np.empty((192, 32, 32, 3), np.uint8), np.arange(192)

    def abandon(times: int) -> tuple[int, int, int]:
        for i in range(times):
            for _ in range(STEPS_AHEAD):
                feed.order(ids + i)
            feed.take(out, ids)
            feed.end()
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/task").iterdir())), resident_bytes()

    before = abandon(100)
    after = abandon(300)
    assert np.array_equal(out, manifest.images("train")[299:491])
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert after[2] < before[2] + 8 * 2**20, "the rings of 600 threads would be 1.4 GB"


@pytest.mark.usefixtures("kept_loaders")
def test_rows_that_are_dropped_end_their_threads(manifest: Manifest, order: Callable[[int], np.ndarray]) -> None:
    before = threading.active_count()
    rows = FfcvRows(manifest, order, threads=2)
    rows.fetch(5)
    assert threading.active_count() == before + 4
    del rows
    gc.collect()
    assert threading.active_count() == before, threading.enumerate()


def fetch_all(rows: FfcvRows, steps: range) -> None:
    for step in steps:
        rows.fetch(step)


def failing(rows: FfcvRows, fail: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV's compiled code of the unlabeled part calls `fail` from now on."""
    loader = rows.feeds[1].loader
    (stage, defined), *_ = loader.code[0]

    def broken(**arguments: object) -> object:
        fail()
        return stage(**arguments)

    monkeypatch.setattr(loader, "code", ([(broken, defined)], loader.code[1]))


@pytest.mark.usefixtures("kept_loaders")
def test_an_exception_of_a_thread_arrives(
    manifest: Manifest, order: Callable[[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no room left")

    monkeypatch.setattr(pipeline, "TIMEOUT_SECONDS", PATIENCE)  # it is not that which ends the wait
    before, rows = threading.active_count(), FfcvRows(manifest, order, threads=2)
    rows.fetch(0)
    failing(rows, fail, monkeypatch)
    with pytest.raises(RuntimeError, match=r"FFCV failed on .*unlabeled\.beton: MemoryError\('no room") as caught:
        fetch_all(rows, range(1, 3 * STEPS_AHEAD))
    assert isinstance(caught.value.__cause__, MemoryError)
    assert threading.active_count() == before, "its threads have ended"
    with pytest.raises(RuntimeError, match=r"data\.source=ffcv is closed"):
        rows.fetch(0)


@pytest.mark.usefixtures("kept_loaders")
def test_a_thread_that_hangs_does_not_hang_the_run(
    manifest: Manifest, order: Callable[[int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, free = FfcvRows(manifest, order, threads=1), threading.Event()
    rows.fetch(0)
    hung = list(rows.feeds[1].epochs)
    monkeypatch.setattr(pipeline, "TIMEOUT_SECONDS", 5.0)
    monkeypatch.setattr(pipeline, "ENDING_SECONDS", 0.1)
    failing(rows, lambda: free.wait(PATIENCE), monkeypatch)
    with pytest.raises(RuntimeError, match=r"FFCV gave no rows of .*unlabeled\.beton within 5 s"):
        fetch_all(rows, range(1, 3 * STEPS_AHEAD))
    free.set()
    for thread in hung:
        thread.join(PATIENCE)


@pytest.mark.usefixtures("kept_loaders")
def test_a_step_may_read_one_file_alone(manifest: Manifest) -> None:
    expected, n = resident(manifest), manifest.length("train")

    def order(step: int) -> np.ndarray:
        return np.arange(60) + (step * 7 if step % 3 else n + step)

    with closing(FfcvRows(manifest, order, threads=2)) as rows:
        for step in range(100):
            assert np.array_equal(rows.fetch(step), expected[order(step)]), step


@pytest.mark.usefixtures("kept_loaders")
def test_rows_that_were_not_ordered_are_noticed(manifest: Manifest) -> None:
    """Whatever mixes up batches, the ids that come with the pixels tell."""
    rows = FfcvRows(manifest, lambda step: np.arange(60) + step, threads=2)
    rows.fetch(0)
    epochs = deque(epoch for epoch, _ in rows.feeds[0].waiting)
    epochs.rotate(1)
    rows.feeds[0].waiting = deque(zip(epochs, (ids for _, ids in rows.feeds[0].waiting), strict=True))
    with pytest.raises(RuntimeError, match=r"gave other rows of .*train\.beton than were ordered"):
        fetch_all(rows, range(1, 4))


@pytest.mark.usefixtures("kept_loaders")
@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (lambda ids: ids - ids.min() - 1, r"sample ids must lie in 0\.\.\d+; got -1\.\."),
        (lambda ids: ids + 10**6, r"sample ids must lie in 0\.\.\d+; got \d{7}\.\."),
        (lambda ids: ids[:-1], r"every step must read 192 samples; step 2 has ids \(191,\)"),
    ],
)
def test_ids_are_checked_before_ffcv_reads_there(
    manifest: Manifest, order: Callable[[int], np.ndarray], wrong: Callable[[np.ndarray], np.ndarray], rule: str
) -> None:
    rows = FfcvRows(manifest, lambda step: wrong(order(step)) if step == 2 else order(step), threads=1)
    with pytest.raises(ValueError, match=rule):
        rows.fetch(0)
    with pytest.raises(ValueError, match=r"data\.threads must be at least 1; got 0"):
        FfcvRows(manifest, order, threads=0)


@pytest.mark.parametrize("part", ["train", "unlabeled"])
def test_a_damaged_file_never_reaches_ffcv(
    manifest: Manifest, order: Callable[[int], np.ndarray], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("FFCV was given the file")

    monkeypatch.setattr(pipeline, "new_loader", refuse)
    path = manifest.root / beton_file(part)
    size = path.stat().st_size
    for place in (0, size // 2, size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.raises(ValueError, match=rf"{part}\.beton: content differs from its SHA-256 in the manifest"):
            FfcvRows(manifest, order, threads=1)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(byte)
    with pytest.raises(AssertionError, match="was given"):
        FfcvRows(manifest, order, threads=1)


def test_torch_and_numpy_are_left_alone(manifest: Manifest, order: Callable[[int], np.ndarray]) -> None:
    """FFCV sets torch's threads when it is imported, in a Loader and in every epoch, and draws its seed from numpy."""
    np.random.seed(5)
    expected = np.random.randint(0, 1000, 3)
    np.random.seed(5)
    torch.set_num_threads(2)
    try:
        with closing(FfcvRows(manifest, order, threads=1)) as rows:
            rows.fetch(0)
            assert torch.get_num_threads() == 2
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert found == [2]
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(np.random.randint(0, 1000, 3), expected)


PROGRAM = """
import sys
import numpy as np
import numba, torch
from semi_fast.prepared.manifest import load_manifest
torch.set_num_threads(2)
from semi_fast.pipelines.ffcv import FfcvRows
manifest = load_manifest(sys.argv[1])
n = manifest.length("train")
order = lambda step: np.concatenate([np.arange(32) + step, n + np.arange(32) + step])
rows = FfcvRows(manifest, order, threads=2)
for step in range(300):
    expected = [manifest.images(part)[step : step + 32] for part in ("train", "unlabeled")]
    assert np.array_equal(rows.fetch(step), np.concatenate(expected))
print(numba.threading_layer(), torch.get_num_threads())
"""


def test_two_files_at_once_are_safe_with_any_threading_layer(manifest: Manifest) -> None:
    """With `workqueue`, two Loaders of FFCV with two workers each end the process; here it even ends without close."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}
    end = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(manifest.root)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert (end.returncode, end.stdout.split()) == (0, ["workqueue", "2"]), end.stderr[-2000:]
