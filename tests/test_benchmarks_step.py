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
from semi_fast.prepared.manifest import Manifest

CPU = torch.device("cpu")
TINY = Shape("wrn_10_1", 16, 8, 1)
SMALL = ["--device", "cpu", "--small", "--model", "wrn_10_1", "--side", "16", "--labeled", "8", "--repeats", "2"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("data") / "synthetic"
    return step_cases.synthetic(out, 16, classes=10, largest=100, tests=40)


def rows_of(out: Path) -> list[dict[str, str]]:
    with out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_benchmark_writes_rows_that_can_be_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.csv"
    rungs = "eager-fp32-contiguous,eager-fp32,graph-compile-bf16"
    assert step.main([*SMALL, "--rungs", rungs, "--out", str(out)]) == 0
    rows = rows_of(out)
    assert [(row["kind"], row["rung"]) for row in rows] == [
        *((kind, "eager-fp32") for kind in ("step", "parts", "evaluation")),
        ("step", "graph-compile-bf16"),
        ("step", "eager-fp32-contiguous"),
        ("launches", "eager-fp32"),
        ("launches", "eager-fp32-contiguous"),
    ], "what matters most comes first, what is profiled last"
    first, cut, evaluation, left_out, other, counts, _ = rows
    for row in (first, other):
        low, ratio, high = (float(row[f"over_first_ratio{part}"]) for part in ("_low", "", "_high"))
        assert 0 < low <= ratio <= high
        assert row["status"] == "measured"
        assert all(float(row[name]) > 0 for name in ("step_ms", "images_per_second", "tflop_per_second"))
        assert float(row["rows_per_second"]) == pytest.approx(2 * float(row["images_per_second"]), rel=1e-3)
        assert row["waits"] == row["peak_mib"] == "", "they are those of a GPU"
    assert left_out["status"] == "a cpu has no CUDA graphs"
    assert left_out["step_ms"] == ""
    assert float(counts["dispatched"]) > 100
    assert all(cut[f"{part}_ms"] for part in step_cases.PARTS)
    assert float(evaluation["paper_minutes"]) == pytest.approx(
        (250_000 * float(first["step_ms"]) + 500 * float(evaluation["evaluation_ms"])) / 60_000, rel=0.01
    )
    for row in rows:
        assert row["command"].startswith("python -m benchmarks.step --device cpu --small --model wrn_10_1")
        assert "--out" not in row["command"]
        assert all(row[name] for name in ("date", "commit", "hardware", "threads", "torch", "python", "clock", "data"))
    printed = capsys.readouterr().out
    assert "graph-compile-bf16: step left out, a cpu has no CUDA graphs" in printed


def test_a_kill_loses_the_running_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "step.csv"
    kept: list[dict[str, str]] = []

    def killed(*_: object) -> None:
        kept.extend(rows_of(out))  # what is on the disk then
        raise KeyboardInterrupt

    monkeypatch.setitem(step.KINDS, "evaluation", killed)
    with pytest.raises(KeyboardInterrupt):
        step.main([*SMALL, "--rungs", "eager-fp32", "--out", str(out)])
    assert [(row["kind"], row["status"]) for row in kept] == [("step", "measured"), ("parts", "measured")]


def test_what_fails_is_a_row_and_ends_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no\nroom")

    out = tmp_path / "step.csv"
    opened = step_cases.open_rung
    monkeypatch.setitem(step.KINDS, "parts", failing)
    monkeypatch.setattr(step_cases, "open_rung", lambda rung, *a: failing() if rung.channels_last else opened(rung, *a))
    rungs = ["--rungs", "eager-fp32-contiguous,eager-fp32", "--cut", "eager-fp32-contiguous,eager-fp32"]
    assert step.main([*SMALL, *rungs, "--out", str(out)]) == 1
    found = [(row["kind"], row["rung"], row["status"]) for row in rows_of(out)]
    assert found == [
        ("step", "eager-fp32", "failed: RuntimeError: no room"),
        ("step", "eager-fp32-contiguous", "measured"),
        ("parts", "eager-fp32-contiguous", "failed: RuntimeError: no room"),
        ("evaluation", "eager-fp32-contiguous", "measured"),
        ("launches", "eager-fp32-contiguous", "measured"),
    ]


@pytest.mark.parametrize("word", ["eager-fp64", "eager_fp32"])
def test_an_unknown_rung_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--device", "cpu", "--rungs", word])
    assert f"got {word}" in capsys.readouterr().err


def test_the_last_part_is_the_whole_step(manifest: Manifest) -> None:
    """And the part before it all of the program: what the parts repeat of it is the same to the bit."""
    with ExitStack() as stack:
        found = []
        for name in ("step", "count", "optimizer"):
            program = step_cases.open_rung(Rung("eager", "fp32"), TINY, manifest, CPU, stack)
            runner = Runner(program)
            runner.step()
            part = runner.step if name == "step" else step_cases.parts(program)[name]
            program.draws.renew(1)
            part()
            found.append({key: tensor.clone() for key, tensor in program.train_step.state.tensors()})
        whole, count, own = found
        assert all(torch.equal(whole[name], count[name]) for name in whole)
        assert all(torch.equal(whole[name], own[name]) for name in whole)
        parts = step_cases.parts(program)
        assert tuple(parts) == step_cases.PARTS
        program.train_step.losses = lambda *_: None  # type: ignore[assignment]
        assert "forward" not in step_cases.parts(program), "nothing cuts compiled code"


def test_every_part_does_more_than_the_one_before(manifest: Manifest) -> None:
    with ExitStack() as stack:
        program = step_cases.open_rung(Rung("eager", "fp32"), TINY, manifest, CPU, stack)
        Runner(program).step()
        counts = []
        for part in step_cases.parts(program).values():
            with step.measure.DispatchCounter() as seen:
                part()
            counts.append(seen.dispatched)
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(("model", "gflop"), [("wrn_28_2", 0.4287), ("resnet50_cifar", 2.5967)])
def test_the_operations_of_a_forward_are_the_published_ones(model: str, gflop: float, tmp_path: Path) -> None:
    data = step_cases.synthetic(tmp_path / "data", 32, classes=10, largest=20, tests=10)
    with ExitStack() as stack:
        shape = Shape(model, 32, 4, 1)
        program = step_cases.open_rung(Rung("eager", "fp32"), shape, data, CPU, stack)
        assert step_cases.forward_flop(program) / 1e9 == pytest.approx(gflop, abs=1e-3)


def test_a_rung_is_what_its_name_says(manifest: Manifest) -> None:
    rungs = step_cases.ladder(["bf16", "fp16"])
    assert len({rung.name for rung in rungs}) == len(rungs) == 10
    assert [rungs[0].name, rungs[-1].name] == ["graph-compile-bf16", "eager-fp32-contiguous"]
    with ExitStack() as stack:
        program = step_cases.open_rung(rungs[-1], TINY, manifest, CPU, stack)
        weight = program.train_step.state.model.get_parameter("backbone.conv1.weight")
        assert weight.is_contiguous()
        assert (program.levels[0].name, program.train_step.precision) == ("eager", "fp32")


def test_synthetic_classes_are_long_tailed_and_fill_every_step(manifest: Manifest) -> None:
    counts = manifest.counts["train"]
    assert isinstance(counts, tuple)
    assert counts[0] == 100
    assert counts[-1] == step_cases.TAIL
    assert list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("rung", "column", "value", "goal"),
    [
        ("graph-compile-bf16", "step_ms", 2.5, "step_ms <= 2.6"),
        ("graph-compile-bf16", "launches", 320, "launches <= 330"),
        ("graph-compile-bf16", "waits", 0, "waits <= 0"),
        ("graph-compile-bf16", "views_share", 0.04, "views_share <= 0.05"),
        ("graph-compile-bf16", "evaluation_share", 0.02, "evaluation_share <= 0.02"),
        ("graph-compile-bf16", "paper_minutes", 11, "paper_minutes <= 12"),
        ("eager-bf16", "over_first_ratio", 2.1, "over_first_ratio >= 2"),
    ],
)
def test_goals_are_judged_on_a_gpu(
    rung: str, column: str, value: float, goal: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = column in ("launches", "waits")
    found = ({}, {column: f"{value}"}) if exact else ({column: Spread(value, value, value)}, {})
    monkeypatch.setitem(step.KINDS, "step", lambda *_: found)
    (chosen,) = (one for one in step_cases.ladder(["bf16"]) if one.name == rung)
    for device, verdict in (("cuda", (goal, "met")), ("cpu", ("", ""))):
        plan = step.Plan(torch.device(device), 1, 1, ())
        with ExitStack() as stack:
            cell = step.StepCell(Shape("wrn_28_2", 32, 64, 1), manifest, plan, stack)
            row = step.row_of("step", chosen, cell)
        assert (row["goal"], row["verdict"]) == verdict
