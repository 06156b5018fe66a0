"""DALI: its own reader reads our shards, and its pipeline gives the resident pixels in our order, from any step."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from semi_fast.data_prep.prepare import publish
from semi_fast.data_prep.readers import Raw
from semi_fast.data_prep.writers.dali import DaliWriter
from semi_fast.loop.sampling import Batches
from semi_fast.pipelines.dali import INSTALL, DaliRows, encoded_size, read_part
from semi_fast.prepared.manifest import Manifest, file_sha256

from .conftest import DEVICE, SHARED

try:
    import nvidia.dali as nvidia_dali
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"NVIDIA DALI is not installed: {INSTALL}", allow_module_level=True)

TRAIN, TEST, UNLABELED = 500, 70, 300
SHARD_ROWS = 190
LABELED = np.random.default_rng(0).permutation(TRAIN)[:90]
POOL = np.setdiff1d(np.arange(TRAIN + UNLABELED), LABELED)  # across both parts and all shards
BATCHES = Batches(LABELED, POOL, seed=5, labeled_rows=16, unlabeled_rows=48)
EPOCH = -(-len(POOL) // 48)
JPEG_MEAN_ERROR = 2.5  # levels, against the source: CIFAR-10 at quality 95 has 1.9
JPEG_DECODER_ERROR = 2  # levels, against Pillow: decoders may round differently


def order(step: int) -> np.ndarray:
    return BATCHES.share(step).ids


@pytest.fixture(scope="module")
def pictures(natural_images: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3]: CIFAR-10 where it is beside the repository, else crops of photographs, all different."""
    n = TRAIN + TEST + UNLABELED
    unpack = SHARED / "data" / "unpack.py"
    if unpack.exists():
        spec = importlib.util.spec_from_file_location("unpack", unpack)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sets, _ = module.read_strips(SHARED / "data" / "cifar10_lossless_webp.tar")
        return sets["test"][0][:n]
    copies = np.concatenate([np.roll(natural_images, k, axis=2) for k in range(-(-n // len(natural_images)))])
    return copies[:n]


@pytest.fixture(scope="module")
def prepared(pictures: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """The same data set with shards of each image format."""
    labels = {"train": np.arange(TRAIN) % 10, "test": np.arange(TEST) % 10}
    parts = ("train", "test", "unlabeled")

    def raw() -> Raw:
        blocks = zip(parts, np.split(pictures, [TRAIN, TRAIN + TEST]), strict=True)
        return Raw("pictures", tuple("abcdefghij"), (32, 32), labels, UNLABELED, blocks, {})

    found = {}
    for image_format in ("raw", "png", "jpeg"):
        manifest = publish(raw, tmp_path_factory.mktemp("data") / image_format, "pictures")
        writer = DaliWriter(raw(), manifest.root, image_format=image_format, shard_rows=SHARD_ROWS)
        for part, block in raw().blocks:
            writer.write(part, block)
        found[image_format] = replace(manifest, containers=writer.finish())
    return found


@pytest.fixture
def copied(prepared: dict[str, Manifest], tmp_path: Path) -> Callable[[str], Manifest]:
    """A data set of an image format, to be damaged; its arrays are not there."""

    def copy(image_format: str) -> Manifest:
        manifest = prepared[image_format]
        (tmp_path / "dali").mkdir()
        for name in manifest.containers:
            (tmp_path / name).write_bytes((manifest.root / name).read_bytes())
        return replace(manifest, root=tmp_path, containers={n: dict(e) for n, e in manifest.containers.items()})

    return copy


def pool(manifest: Manifest) -> np.ndarray:
    """The resident pixels of every sample id."""
    return np.concatenate([manifest.images(part) for part in ("train", "unlabeled")])


def opened(manifest: Manifest, order: Callable[[int], np.ndarray] = order, threads: int = 1) -> Any:
    return closing(DaliRows(manifest, order, threads=threads))


def threads_alive() -> int:
    return len(os.listdir("/proc/self/task"))


def memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("image_format", ["raw", "png"])
def test_the_reader_of_dali_reads_our_shards_with_our_index(prepared: dict[str, Manifest], image_format: str) -> None:
    from nvidia.dali import fn, tfrecord, types

    manifest = prepared[image_format]
    for part, first_id in (("train", 0), ("test", 0), ("unlabeled", TRAIN)):
        shards = [manifest.root / n for n in sorted(manifest.containers) if n.startswith(f"dali/{part}")]
        features = {"image": tfrecord.FixedLenFeature((), tfrecord.string, "")}
        features |= {name: tfrecord.FixedLenFeature([1], tfrecord.int64, -7) for name in ("label", "index")}
        n = manifest.length(part)
        pipeline = nvidia_dali.Pipeline(n, 1, None, prefetch_queue_depth=1)
        with pipeline:
            read = fn.readers.tfrecord(
                path=[str(path) for path in shards if path.suffix == ".tfrecord"],
                index_path=[str(path) for path in shards if path.suffix == ".idx"],
                features=features,
            )
            if image_format == "raw":
                image = fn.reshape(read["image"], shape=[32, 32, 3])
            else:
                image = fn.decoders.image(read["image"], device="cpu", output_type=types.RGB)
            pipeline.set_outputs(image, read["label"], read["index"])
        images, labels, ids = (np.asarray(out.as_tensor()) for out in pipeline.run())
        assert np.array_equal(images, manifest.images(part))
        expected = np.full(n, -1) if part == "unlabeled" else manifest.labels(part)
        assert np.array_equal(labels[:, 0], expected)
        assert np.array_equal(ids[:, 0], first_id + np.arange(n))


@pytest.mark.parametrize(("image_format", "threads"), [("raw", 1), ("png", 1), ("png", 3)])
def test_three_epochs_give_the_resident_pixels(prepared: dict[str, Manifest], image_format: str, threads: int) -> None:
    manifest = prepared[image_format]
    expected = pool(manifest)
    seen = set()
    held = []
    with opened(manifest, threads=threads) as rows:
        for step in range(3 * EPOCH):
            pixels = rows.fetch(step)
            assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 32, 32, 3))
            assert np.array_equal(pixels, expected[order(step)])
            seen |= set(order(step).tolist())
            held.append(pixels)
    assert seen == set(range(TRAIN + UNLABELED))
    for step, pixels in enumerate(held):  # what was handed out stays what it was
        assert np.array_equal(pixels, expected[order(step)])


def test_jpeg_is_near_the_source_and_what_any_decoder_gives(prepared: dict[str, Manifest]) -> None:
    manifest = prepared["jpeg"]
    with opened(manifest) as rows:
        pixels = rows.fetch(3).astype(int)
        stored = [Image.open(io.BytesIO(image.tobytes())) for image in rows.shards.batch(order(3))]
    assert abs(pixels - np.stack([np.asarray(image) for image in stored])).max() <= JPEG_DECODER_ERROR
    assert 0 < abs(pixels - pool(manifest)[order(3)]).mean() <= JPEG_MEAN_ERROR


@pytest.mark.parametrize("image_format", ["raw", "png"])
def test_any_step_can_be_the_first(prepared: dict[str, Manifest], image_format: str) -> None:
    manifest = prepared[image_format]
    expected = pool(manifest)
    for first in (0, 1, 2, 7, EPOCH - 1, EPOCH, 1000):
        with opened(manifest) as rows:
            for step in (first, first + 1):
                assert np.array_equal(rows.fetch(step), expected[order(step)])
    with opened(manifest) as rows:
        for step in (5, 6, 6, 5, 8, 9, 0, 1, 2, 2000, 3):
            assert np.array_equal(rows.fetch(step), expected[order(step)])


def test_the_next_step_is_decoded_ahead_and_each_step_once(prepared: dict[str, Manifest]) -> None:
    asked = []

    def watched(step: int) -> np.ndarray:
        asked.append(step)
        return order(step)

    with opened(prepared["raw"], watched) as rows:
        for step in range(4):
            rows.fetch(step)
            assert asked == list(range(step + 2))


def test_pixels_are_written_into_a_tensor_and_fetched_by_a_thread(prepared: dict[str, Manifest]) -> None:
    manifest = prepared["png"]
    expected = torch.from_numpy(pool(manifest))
    out = torch.zeros(64, 32, 32, 3, dtype=torch.uint8, device=DEVICE)
    with closing(DaliRows(manifest, order, threads=1, device=DEVICE)) as rows, ThreadPoolExecutor(1) as thread:
        for step in (0, 1, 2, 9):
            thread.submit(rows.fetch_into, step, out).result()
            assert torch.equal(out.cpu(), expected[order(step)])
        with pytest.raises(AssertionError):
            rows.fetch_into(10, out[:5])


@pytest.mark.parametrize("image_format", ["raw", "png", "jpeg"])
def test_a_part_is_read_in_order(prepared: dict[str, Manifest], image_format: str) -> None:
    for part in ("train", "test", "unlabeled"):
        expected = prepared[image_format].images(part)
        pixels = read_part(prepared[image_format], part, threads=2)
        assert (pixels.dtype, pixels.shape) == (np.uint8, expected.shape)
        if image_format == "jpeg":
            assert abs(pixels.astype(int) - expected).mean() <= JPEG_MEAN_ERROR
        else:
            assert np.array_equal(pixels, expected)


def test_a_part_without_images_is_empty(prepared: dict[str, Manifest]) -> None:
    manifest = prepared["raw"]
    counts = manifest.counts | {"unlabeled": 0}
    kept = {n: e for n, e in manifest.containers.items() if e["part"] != "unlabeled"}
    manifest = replace(manifest, counts=counts, containers=kept)
    assert read_part(manifest, "unlabeled", threads=1).shape == (0, 32, 32, 3)
    with opened(manifest, lambda step: np.arange(8) + 492 * (step % 2)) as rows:
        assert np.array_equal(rows.fetch(1), manifest.images("train")[492:])


@pytest.mark.parametrize("image_format", ["raw", "png"])
@pytest.mark.parametrize("closed", [True, False])
def test_threads_memory_and_files_end_with_their_pipeline(
    prepared: dict[str, Manifest], image_format: str, closed: bool
) -> None:
    """Abandoned ones too, without the help of the garbage collector; 40 times the shards would be 80 MiB or more."""

    def one() -> None:
        rows = DaliRows(prepared[image_format], order, threads=2)
        rows.fetch(0)
        rows.fetch(1)
        if closed:
            rows.close()
            assert threads_alive() == before

    before = threads_alive()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            one()
        memory, files = memory_mib(), len(os.listdir("/proc/self/fd"))
        for _ in range(40):
            one()
            assert threads_alive() == before
        assert len(os.listdir("/proc/self/fd")) == files
        assert memory_mib() - memory < 20
    finally:
        gc.enable()
    assert threading.active_count() <= before


def short(step: int) -> np.ndarray:
    return order(step)[: 10 if step == 4 else None]


def outside(step: int) -> np.ndarray:
    return order(step) - (TRAIN + UNLABELED) * (step == 4)


def failing(step: int) -> np.ndarray:
    if step == 4:
        raise OSError("the disk is gone")
    return order(step)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (short, ValueError, "every step must have 64 rows; step 4 has 10"),
        (outside, ValueError, r"sample ids must be in 0\.\.799, at least one; got -"),
        (failing, OSError, "the disk is gone"),
    ],
)
def test_an_error_arrives_and_the_next_fetch_begins_anew(
    prepared: dict[str, Manifest], broken: Callable[[int], np.ndarray], error: type[Exception], message: str
) -> None:
    manifest = prepared["png"]
    expected = pool(manifest)
    before = threads_alive()
    with opened(manifest, broken) as rows:
        for step in range(3):
            rows.fetch(step)
        for step in (3, 4):
            with pytest.raises(error, match=message):
                rows.fetch(step)
            assert threads_alive() == before
        for step in (5, 6, 1):
            assert np.array_equal(rows.fetch(step), expected[order(step)])


def reseal(manifest: Manifest, name: str) -> None:
    """Make the manifest agree with a shard."""
    path = manifest.root / name
    manifest.containers[name] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def patched(manifest: Manifest, at: int, change: Callable[[bytes], bytes]) -> None:
    """Change the second train shard's image `at` in place, and make its manifest agree."""
    name = "dali/train-00001-of-00003.tfrecord"
    with closing(DaliRows(manifest, order, threads=1)) as rows:
        first, size = rows.shards.shards[1].images[at]
    content = (manifest.root / name).read_bytes()
    image = change(content[first : first + size])
    assert len(image) == size
    (manifest.root / name).write_bytes(content[:first] + image + content[first + size :])
    reseal(manifest, name)


def announced(height: int, width: int) -> Callable[[bytes], bytes]:
    return lambda image: image[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + image[24:]


def only_image_15(step: int) -> np.ndarray:
    """An order in which step 2 has the image 15 of the second shard, and no other step has."""
    return np.array([SHARD_ROWS + (15 if step == 2 else 14)] * 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (announced(60_000, 60_000), ValueError, r"image 205 must be a PNG or JPEG of \(32, 32\) pixels"),
        (announced(0, 32), ValueError, "image 205 must be"),
        (lambda image: bytes(len(image)), ValueError, "image 205 must be"),
        (lambda image: image[:60] + bytes(len(image) - 60), RuntimeError, r"(?s)decode"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_an_error_of_its_step(
    copied: Callable[[str], Manifest], change: Callable[[bytes], bytes], error: type[Exception], message: str
) -> None:
    manifest = copied("png")
    patched(manifest, 15, change)
    with opened(manifest, only_image_15) as rows:
        rows.fetch(0)
        with pytest.raises(error, match=message):  # noqa: PT012, at its step or one before
            rows.fetch(1)
            rows.fetch(2)
        first = rows.fetch(3)
        assert np.array_equal(rows.fetch(4), first)


def test_sizes_are_read_from_headers(pictures: np.ndarray) -> None:
    for height, width in ((1, 1), (5, 300), (300, 5), (32, 32)):
        for image_format in ("PNG", "JPEG"):
            for progressive in (False, True):
                out = io.BytesIO()
                Image.new("RGB", (width, height)).save(out, image_format, progressive=progressive)
                image = out.getvalue()
                assert encoded_size(memoryview(image)) == (height, width)
                for end in range(len(image)):
                    assert encoded_size(memoryview(image[:end])) in (None, (height, width))
    for other in (b"", b"GIF89a", bytes(100), b"\xff\xd8\xff" + b"\xff" * 100, b"\xff\xd8\xff" + bytes(100)):
        assert encoded_size(memoryview(other)) is None


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def cut(path: Path, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def shift_entries(manifest: Manifest) -> None:
    for name, entry in manifest.containers.items():
        entry["first"] += 10 * ("train-00001" in name)


def forget(manifest: Manifest, number: int) -> None:
    for name in [n for n in manifest.containers if f"unlabeled-{number:05d}" in n]:
        del manifest.containers[name]


def miscount(manifest: Manifest) -> None:
    for name, entry in manifest.containers.items():
        if "train-00002" in name:
            entry["rows"] -= 1


def mix(manifest: Manifest) -> None:
    for name, entry in manifest.containers.items():
        entry["image_format"] = "png" if "unlabeled-00001" in name else "raw"


def cut_and_reseal(manifest: Manifest) -> None:
    cut(manifest.root / FIRST, 0.5)
    reseal(manifest, FIRST)


def flip_length_and_reseal(manifest: Manifest) -> None:
    flip(manifest.root / FIRST, 1)
    reseal(manifest, FIRST)


FIRST = "dali/train-00000-of-00003.tfrecord"
INDEX = "dali/train-00000-of-00003.idx"
DAMAGE: list[tuple[Callable[[Manifest], object], str]] = [
    (lambda m: flip(m.root / FIRST, 400_000), r"train-00000.*tfrecord: content differs from its SHA-256"),
    (lambda m: flip(m.root / "dali/unlabeled-00001-of-00002.tfrecord", 0), "unlabeled-00001.*content differs"),
    (lambda m: flip(m.root / INDEX, 7), r"train-00000.*idx: content differs from its SHA-256"),
    (lambda m: cut(m.root / FIRST, 0.999), "must have .* bytes, has"),
    (lambda m: cut(m.root / FIRST, 0), "must have .* bytes, has 0"),
    (lambda m: cut(m.root / INDEX, 0.5), "must have .* bytes, has"),
    (lambda m: (m.root / FIRST).unlink(), "named by the manifest, but missing"),
    (lambda m: (m.root / INDEX).unlink(), "named by the manifest, but missing"),
    (cut_and_reseal, "must follow each other and fill"),
    (flip_length_and_reseal, "the length of record 0 is damaged"),
    (shift_entries, "train-00001-of-00003.tfrecord: must begin with row 190 of train"),
    (lambda m: forget(m, 0), "unlabeled-00001-of-00002.tfrecord: must begin with row 0 of unlabeled"),
    (lambda m: forget(m, 1), "the shards of unlabeled must hold 300 rows, they hold 190"),
    (miscount, "must (have|list) 119 (lines|records)"),
    (mix, "shards must be of one image format"),
    (lambda m: m.containers.pop(INDEX), "the manifest must name its index dali/train-00000-of-00003.idx"),
    (lambda m: m.containers.clear(), "the shards of train must hold 500 rows, they hold 0; prepare it again"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_shards_are_refused_before_dali_sees_them(
    copied: Callable[[str], Manifest],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Manifest], object],
    message: str,
) -> None:
    manifest = copied("raw")
    monkeypatch.setattr(nvidia_dali, "Pipeline", None)
    damage(manifest)
    with pytest.raises(ValueError, match=message) as caught:
        DaliRows(manifest, order, threads=1)
    assert str(manifest.root) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        read_part(manifest, "unlabeled" if "unlabeled" in message or damage is mix else "train", threads=1)


def test_raw_images_of_another_size_are_refused(copied: Callable[[str], Manifest]) -> None:
    manifest = replace(copied("raw"), resolution=(32, 31))
    with pytest.raises(ValueError, match="every image must have 2976 bytes; damaged"):
        DaliRows(manifest, order, threads=1)


def test_a_missing_dali_is_one_line_with_the_command(
    prepared: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for use in (lambda m: DaliRows(m, order, threads=1), lambda m: read_part(m, "test", threads=1)):
        with pytest.raises(RuntimeError, match=r"needs NVIDIA DALI.*pip install 'semi-fast\[dali\]'$") as caught:
            use(prepared["raw"])
        assert "\n" not in str(caught.value)
