"""The benchmark of whole steps runs, leaves out what a device cannot do, and cuts a step into its own parts."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks import step, step_cases
from benchmarks.measure import Spread
from benchmarks.step_cases import Rung, Runner, Shape
from semi_fast.manifest import Manifest

CPU = torch.device("cpu")
TINY = Shape("wrn_10_1", 16, 8, 1)
SMALL = ["--device", "cpu", "--small", "--model", "wrn_10_1", "--side", "16", "--labeled", "8", "--repeats", "2"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("data") / "synthetic"
    return step_cases.synthetic(out, 16, classes=10, largest=100, tests=40)


def test_the_benchmark_writes_rows_that_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.csv"
    step.main([*SMALL, "--rungs", "eager-fp32-contiguous,eager-fp32,graph-compile-bf16", "--out", str(out)])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["rung"] for row in rows] == ["eager-fp32-contiguous", "eager-fp32", "graph-compile-bf16"]
    for row in rows[:2]:
        low, ratio, high = (float(row[f"over_first_ratio{part}"]) for part in ("_low", "", "_high"))
        assert 0 < low <= ratio <= high
        assert row["status"] == "measured"
        assert all(float(row[name]) > 0 for name in ("step_ms", "images_per_second", "tflop_per_second", "dispatched"))
        assert float(row["rows_per_second"]) == pytest.approx(2 * float(row["images_per_second"]), rel=1e-3)
        assert row["waits"] == row["peak_mib"] == "", "they are those of a GPU"
    assert float(rows[0]["over_first_ratio"]) == 1
    assert float(rows[0]["over_eager_ratio"]) > 0
    assert rows[2]["status"] == "a cpu has no CUDA graphs"
    assert rows[2]["step_ms"] == ""
    for row in rows:
        assert row["command"].startswith("python -m benchmarks.step --device cpu --small --model wrn_10_1")
        assert "--out" not in row["command"]
        assert all(row[name] for name in ("date", "commit", "hardware", "threads", "torch", "python", "clock", "data"))
    cut = rows[1]
    together = sum(float(cut[f"{part}_ms"]) for part in step_cases.PARTS)
    assert together == pytest.approx(float(cut["step_ms"]), rel=0.5)
    assert rows[0]["views_ms"] == ""
    printed = capsys.readouterr().out
    assert "graph-compile-bf16: left out, a cpu has no CUDA graphs" in printed


@pytest.mark.parametrize("word", ["eager-fp64", "eager_fp32"])
def test_an_unknown_rung_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--device", "cpu", "--rungs", word])
    assert f"got {word}" in capsys.readouterr().err


def test_the_last_part_is_the_whole_step(manifest: Manifest) -> None:
    """And the part before it all of the program: what the parts repeat of it is the same to the bit."""
    with ExitStack() as stack:
        found = []
        for name in ("step", "count", "update"):
            engine = step_cases.open_rung(Rung("eager", "fp32"), TINY, manifest, CPU, stack)
            runner = Runner(engine)
            runner.step()
            part = runner.step if name == "step" else step_cases.parts(engine)[name]
            engine.draws.renew(1)
            part()
            found.append({key: tensor.clone() for key, tensor in engine.program.state.tensors()})
        whole, count, update = found
        assert all(torch.equal(whole[name], count[name]) for name in whole)
        assert all(torch.equal(whole[name], update[name]) for name in whole)
        parts = step_cases.parts(engine)
        assert tuple(parts) == step_cases.PARTS
        engine.program.losses = lambda *_: None  # type: ignore[assignment]
        assert "forward" not in step_cases.parts(engine), "nothing cuts compiled code"


def test_every_part_does_more_than_the_one_before(manifest: Manifest) -> None:
    with ExitStack() as stack:
        engine = step_cases.open_rung(Rung("eager", "fp32"), TINY, manifest, CPU, stack)
        Runner(engine).step()
        counts = []
        for part in step_cases.parts(engine).values():
            with step.measure.DispatchCounter() as seen:
                part()
            counts.append(seen.dispatched)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("model", "gflop"), [("wrn_28_2", 0.4287), ("resnet50_cifar", 2.5967)])
def test_the_operations_of_a_forward_are_the_published_ones(model: str, gflop: float, tmp_path: Path) -> None:
    data = step_cases.synthetic(tmp_path / "data", 32, classes=10, largest=20, tests=10)
    with ExitStack() as stack:
        shape = Shape(model, 32, 4, 1)
        engine = step_cases.open_rung(Rung("eager", "fp32"), shape, data, CPU, stack)
        assert step_cases.forward_flop(engine) / 1e9 == pytest.approx(gflop, abs=1e-3)


def test_a_rung_is_what_its_name_says(manifest: Manifest) -> None:
    rungs = step_cases.ladder(["bf16", "fp16"])
    assert len({rung.name for rung in rungs}) == len(rungs) == 10
    assert step.FASTEST in rungs
    with ExitStack() as stack:
        engine = step_cases.open_rung(rungs[0], TINY, manifest, CPU, stack)
        weight = engine.program.state.model.get_parameter("backbone.conv1.weight")
        assert weight.is_contiguous()
        assert (engine.config.engine.level, engine.config.precision) == ("eager", "fp32")


def test_synthetic_classes_are_long_tailed_and_fill_every_step(manifest: Manifest) -> None:
    counts = manifest.counts["train"]
    assert isinstance(counts, tuple)
    assert counts[0] == 100
    assert counts[-1] == step_cases.TAIL
    assert list(counts) == sorted(counts, reverse=True)


def test_a_goal_of_the_fastest_rung_is_judged_on_a_gpu() -> None:
    found = {"step_ms": Spread(2.4, 2.3, 2.5), "same_over_same_ratio": Spread(1, 1, 1)}
    ((goal, _),) = step.GOALS.values()
    assert step.ops.judge([goal], found, torch.device("cuda")) == ("step_ms <= 2.6", "met")
    assert step.ops.judge([goal], found, CPU) == ("", "")
