"""The benchmark of the pipelines runs, counts the time of workers, and compares views of the same kind."""

from __future__ import annotations

import csv
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from benchmarks import pipelines
from benchmarks.pipeline_cases import BASELINE, PIPELINES, synthetic_data

from .conftest import PATIENCE


def test_the_benchmark_writes_rows_that_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, chart = tmp_path / "pipelines.csv", tmp_path / "pipelines.png"
    words = ["--only", "resident", "--repeats", "1", "--seconds", "0.05", "--images", "100"]
    pipelines.main([*words, "--out", str(out), "--chart", str(chart)])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["pipeline"] for row in rows] == [BASELINE, "resident"]
    for row in rows:
        low, ratio, high = (float(row[f"cpu_ratio{part}"]) for part in ("_low", "", "_high"))
        assert 0 < low <= ratio <= high
        assert all(float(row[name]) > 0 for name in ("wall_per_second", "per_cpu_second", "first_batch_seconds"))
        assert (row["side"], row["unit"], row["status"], row["n"]) == ("32", "views", "measured", "1")
        assert row["command"] == f"python -m benchmarks.pipelines {' '.join(words)}"
        assert all(row[name] for name in ("date", "commit", "hardware", "threads", "libraries", "data", "clock"))
    assert float(rows[0]["cpu_ratio"]) == 1
    assert float(rows[1]["cpu_ratio"]) > 1
    assert "cpu_ratio >= 4" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_pipelines_give_views_of_the_same_kind(tmp_path: Path) -> None:
    data = synthetic_data(tmp_path, 32, 600)
    made = {name: PIPELINES[name].open(data) for name in (BASELINE, "torchvision", "resident")}
    for name, batches in made.items():
        batch = next(batches)
        if name != "resident":
            (labeled, labels), (unlabeled, _) = batch
            assert labels.shape == (64,)
            batch = torch.cat([*labeled, *unlabeled])
        assert batch.shape == (256, 3, 32, 32)
        assert batch.dtype == torch.float32
        weak = batch[:128]
        assert abs(float(weak.mean())) < 0.15, name
        assert float(weak.std()) == pytest.approx(1, abs=0.15), name
        batches.close()


def burn(seconds: float, done: multiprocessing.Queue[bool]) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    done.put(True)
    time.sleep(PATIENCE)


def test_the_time_of_workers_is_counted_while_they_run_and_after() -> None:
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    worker = context.Process(target=burn, args=(0.3, done), daemon=True)
    before = pipelines.cpu_seconds()
    worker.start()
    assert done.get(timeout=PATIENCE)
    running = pipelines.cpu_seconds() - before
    worker.terminate()
    worker.join()
    assert running > 0.3
    assert pipelines.cpu_seconds() - before >= running - 0.02  # what has ended is counted in ticks of the clock


def test_the_command_names_no_folder_of_the_machine() -> None:
    words = ["--data", "/some/where/cifar10", "--out", "/a/b.csv", "--chart=/a/b.png", "--repeats", "3"]
    assert pipelines.repeated(words) == "python -m benchmarks.pipelines --data cifar10 --repeats 3"


@pytest.mark.parametrize("word", ["ffcv,nothing", "Pillow"])
def test_an_unknown_pipeline_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipelines.main(["--only", word])
    assert f"got {word}" in capsys.readouterr().err
