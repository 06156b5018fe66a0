"""Sources: the same pixels from memory and from the disk, one step ahead, and what ends with an error or a jump."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

from semi_fast import train
from semi_fast.data_prep.long_tail import split_for
from semi_fast.loop.sampling import Batches
from semi_fast.pipelines import host, source
from semi_fast.pipelines.host import HostSource, MappedRows
from semi_fast.pipelines.source import open_source, read_part
from semi_fast.prepared.manifest import Manifest, load_manifest, seal_split
from semi_fast.train import run

from .tiny import config

CPU = torch.device("cpu")


@pytest.fixture
def manifest(digits: Path) -> Manifest:
    return load_manifest(digits)


def batches() -> Batches:
    return Batches(np.arange(70), np.arange(900), seed=3, labeled_rows=8, unlabeled_rows=24)


def rows_of(
    opened: source.Source, order: Callable[[int], np.ndarray], resolution: tuple[int, int], step: int
) -> torch.Tensor:
    ids = torch.from_numpy(order(step))
    out = torch.full((len(ids), *resolution, 3), 77, dtype=torch.uint8)
    opened.fetch(step, out)
    opened.read(ids, out)
    return out


def test_auto_is_memory_where_the_pixels_fit(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    order = lambda step: batches().share(step).ids  # noqa: E731
    opened = open_source("auto", manifest, CPU, order, threads=1)
    assert "resident in device memory: 1 MiB of pixels, " in opened.description
    monkeypatch.setattr(source, "FITS", 0.0)
    ahead = open_source("auto", manifest, CPU, order, threads=1)
    assert isinstance(ahead, HostSource)
    assert re.search(r"read ahead: 1 MiB of pixels, [\d,]+ MiB free on cpu, at most half", ahead.description)
    for step in (*range(80), 5, 6, 200):  # three visits of the labeled images, a jump back and one forward
        expected = rows_of(opened, order, manifest.resolution, step)
        assert torch.equal(rows_of(ahead, order, manifest.resolution, step), expected)
        assert torch.equal(expected, torch.from_numpy(manifest.images("train")[order(step)]))
    ahead.close()
    opened.close()


def test_a_format_that_was_not_prepared_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"data\.source is dali, but .* holds resident: prepare it with --formats"):
        open_source("dali", manifest, CPU, lambda step: np.arange(4), threads=1)


class Broken:
    """Rows that fail at step 3, or come only once they are `free`."""

    def __init__(self, free: threading.Event | None = None):
        self.free, self.closed = free, False

    def fetch(self, step: int) -> np.ndarray:
        if self.free:
            self.free.wait()
        if step == 3:
            raise OSError("the disk is gone")
        return np.full((2, 4, 4, 3), step, np.uint8)

    def close(self) -> None:
        self.closed = True


def test_an_error_of_the_thread_arrives_at_its_step_and_threads_end() -> None:
    before = threading.active_count()
    rows = Broken()
    opened = HostSource(rows, CPU, "broken")
    out = torch.empty(2, 4, 4, 3, dtype=torch.uint8)
    for step in range(3):
        opened.fetch(step, out)
        assert out.eq(step).all()
    with pytest.raises(OSError, match="the disk is gone"):
        opened.fetch(3, out)
    opened.close()
    assert rows.closed
    assert threading.active_count() == before


def test_a_gpu_has_its_number_from_the_start_of_a_run(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's of a single process has none, and torch.cuda.set_device, which the thread calls, refuses it."""

    class Reached(Exception):
        pass

    def make_state(*_: object, device: torch.device) -> None:
        raise Reached(device)

    options, nameless = config(digits, None), torch.device("cuda")
    split = seal_split(split_for(load_manifest(digits), "run", options.split))
    accelerator = SimpleNamespace(device=nameless, is_main_process=True, num_processes=1, process_index=0)
    set_to: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", set_to.append, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", Mock())
    monkeypatch.setattr(torch.cuda, "Stream", Mock())
    monkeypatch.setattr(train, "make_state", make_state)
    with pytest.raises(Reached) as reached, ExitStack() as stack:
        train.build(options, load_manifest(digits), split, accelerator, run_dir=digits, meta={}, stack=stack)  # type: ignore[arg-type]
    opened = HostSource(Broken(), reached.value.args[0], "on a GPU")
    opened.thread.submit(int).result()
    opened.close()
    assert set_to == [0]
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(nameless)


def test_the_buffers_of_a_decoder_are_its_own_when_it_first_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is new to the thread's stream alone: work that is queued may still use what was there before."""
    for name in ("Event", "Stream", "stream", "set_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())

    class Decoder(Broken):
        def fetch_into(self, step: int, out: torch.Tensor) -> None:
            streams.wait_stream.assert_called_once_with(torch.cuda.current_stream.return_value)  # type: ignore[attr-defined]
            out.fill_(step)

    opened = HostSource(Decoder(), torch.device("cuda:0"), "on a GPU", on_device=True)
    streams: Any = opened.stream
    out = torch.empty(2, 4, 4, 3, dtype=torch.uint8)
    for step in range(3):
        opened.fetch(step, out)
        assert out.eq(step).all()
    opened.close()


def test_rows_that_do_not_come_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PATIENCE_SECONDS", 0.05)
    free = threading.Event()
    opened = HostSource(Broken(free), CPU, "slow")
    with pytest.raises(RuntimeError, match="the rows of step 0 did not come within 0 s"):
        opened.fetch(0, torch.empty(2, 4, 4, 3, dtype=torch.uint8))
    free.set()
    opened.close()


def test_parts_are_read_whole_or_by_rows(manifest: Manifest) -> None:
    test = read_part(manifest, "test", threads=1)
    assert np.array_equal(test, manifest.images("test"))
    assert np.array_equal(
        read_part(manifest, "train", threads=1, rows=np.array([5, 2])), manifest.images("train")[[5, 2]]
    )


def test_a_run_from_the_disk_ends_with_the_weights_of_one_from_memory(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    before = threading.active_count()
    run(config(digits, tmp_path / "a"))
    monkeypatch.setattr(source, "FITS", 0.0)
    run(config(digits, tmp_path / "b"))
    ours, theirs = (load_file(tmp_path / x / "checkpoints/step_000000012/state.safetensors") for x in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not [t for t in threading.enumerate() if t.name.startswith("rows")]
    assert threading.active_count() <= before + 1


def test_mapped_rows_reach_the_unlabeled_part() -> None:
    class Parts:
        def verified_images(self, part: str) -> np.ndarray:
            return np.full((3, 2, 2, 3), 1 if part == "train" else 2, np.uint8)

    rows = MappedRows(Parts(), lambda step: np.array([0, 4, 2, 3]))  # type: ignore[arg-type]
    assert rows.fetch(0)[:, 0, 0, 0].tolist() == [1, 2, 1, 2]
