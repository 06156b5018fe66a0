"""The suite for a GPU on a CPU: what it checks can fail, what failed is kept and repeated, what is there is not."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_cells, gpu_checks, gpu_kernels, gpu_machine, gpu_parts, gpu_suite
from benchmarks.gpu_rows import Bound, Row, Setting, checked, measured, not_run
from benchmarks.gpu_suite import Section
from benchmarks.measure import Spread
from benchmarks.step_cases import open_engine
from semi_fast.ops.bank_push import bank_push
from semi_fast.ops.draw_views import draw_views
from semi_fast.ops.embedding_align import embedding_align
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.ops.pseudo_label import pseudo_label
from semi_fast.ops.rand_augment import rand_augment

CPU = torch.device("cpu")


def setting(seconds: float = 100.0) -> Setting:
    return Setting(CPU, None, True, time.monotonic() + seconds, seconds)


def verdicts(rows: Iterator[Row]) -> set[str]:
    return {row.verdict for row in rows}


def broken_views(*args: Any, **options: Any) -> torch.Tensor:
    views = rand_augment(*args, **options)
    views[-1, 0, 0, 0] += 1
    return views


def broken_drawing(*args: Any, **options: Any) -> Any:
    sources, drawn = draw_views(*args, **options)
    return sources, drawn._replace(flip=1 - drawn.flip)


def broken_bank(*args: Any, **options: Any) -> None:
    bank_push(*args, **options)
    args[1][0, 0] += 1


def broken_labels(*args: Any, **options: Any) -> Any:
    found = pseudo_label(*args, **options)
    return found._replace(confidence=found.confidence * (1 + 1e-3))


def broken_loss(*args: Any) -> torch.Tensor:
    return masked_cross_entropy(*args) * 1.001


def broken_alignment(*args: Any, **options: Any) -> Any:
    loss, target = embedding_align(*args, **options)
    return loss * 1.001, target


BROKEN: dict[str, Callable[..., Any]] = {
    "rand_augment": broken_views,
    "draw_views": broken_drawing,
    "bank_push": broken_bank,
    "pseudo_label": broken_labels,
    "masked_cross_entropy": broken_loss,
    "embedding_align": broken_alignment,
}


@pytest.mark.parametrize("name", gpu_kernels.OPERATIONS)
def test_a_broken_kernel_is_seen(name: str) -> None:
    check, op = gpu_kernels.OPERATIONS[name]
    assert verdicts(gpu_kernels.kernels(setting(), {name: (check, op)})) == {"ok"}
    rows = list(gpu_kernels.kernels(setting(), {name: (check, BROKEN[name])}))
    assert "FAILED" in verdicts(iter(rows))


def test_a_kernel_that_raises_leaves_the_others() -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise RuntimeError("no\ncompiler")

    check = gpu_kernels.OPERATIONS["draw_views"]
    rows = list(gpu_kernels.kernels(setting(), {"first": (check[0], raising), "second": check}))
    assert (rows[0].verdict, rows[0].note) == ("FAILED", "RuntimeError: no compiler")
    assert verdicts(iter(rows[1:])) == {"ok"}


def test_a_captured_step_that_differs_is_seen() -> None:
    with gpu_checks.small_data(setting()) as manifest, ExitStack() as stack:
        config = gpu_checks.quick(manifest, setting(), "--precision=fp32", model="wrn_10_1", labeled=8)
        eager, other = (open_engine(config, manifest, stack) for _ in range(2))
        assert gpu_checks.leaves_no_trace(other).verdict == "ok"
        assert verdicts(gpu_checks.same_steps(eager, other, 3)) == {"ok"}
        weight = other.program.state.model.get_parameter("backbone.conv1.weight")
        weight.data[0, 0, 0, 0] += 1e-6
        rows = list(gpu_checks.same_steps(eager, other, 1))
        assert rows[0].verdict == "FAILED"
        assert "model.backbone.conv1.weight" in rows[0].note or int(rows[0].value) > 4


def test_a_rehearsal_that_leaves_a_trace_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "rehearse", lambda work, changed, device: work())
    with gpu_checks.small_data(setting()) as manifest, ExitStack() as stack:
        config = gpu_checks.quick(manifest, setting(), "--precision=fp32", model="wrn_10_1", labeled=8)
        row = gpu_checks.leaves_no_trace(open_engine(config, manifest, stack))
    assert row.verdict == "FAILED"


def test_a_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is torch's on a GPU; here it is one that no step can pass."""

    @contextmanager
    def strict(device: torch.device) -> Iterator[None]:
        raise RuntimeError("called a synchronizing CUDA operation")
        yield

    assert verdicts(gpu_checks.sync(setting())) == {"not run"}
    monkeypatch.setattr(gpu_checks, "waits_are_errors", strict)
    rows = list(gpu_checks.sync(setting()))
    assert (rows[0].verdict, rows[0].note) == ("FAILED", "RuntimeError: called a synchronizing CUDA operation")


def test_a_resumed_run_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    load = gpu_checks.load_file

    def damaged(path: Path) -> dict[str, torch.Tensor]:
        tensors = load(path)
        return tensors | ({"step": tensors["step"] + 1} if "broken" in str(path) else {})

    monkeypatch.setattr(gpu_checks, "load_file", damaged)
    (row,) = gpu_checks.resume(setting())
    assert (row.verdict, row.value, row.note) == ("FAILED", "1", "1 differ, by at most 1: step")


@pytest.mark.parametrize(
    ("fast", "verdict"), [([70, 71, 72], "met"), ([60, 61, 62], "missed"), ([70, 71], "inconclusive")]
)
def test_parity_is_judged_by_the_spread_of_seeds(fast: list[float], verdict: str) -> None:
    plain = [71.0, 72.0, 73.0][: len(fast)]
    full = setting()._replace(small=False)
    rows = list(gpu_checks.judged_parity({"fp32 eager": plain, "bf16": fast}, 300, "digits", full))
    assert rows[-1].verdict == verdict


@pytest.mark.parametrize(
    ("spread", "bound", "steady", "verdict"),
    [
        (Spread(2.4, 2.3, 2.5), Bound(2.6), 1.0, "met"),
        (Spread(2.8, 2.7, 2.9), Bound(2.6), 1.0, "missed"),
        (Spread(2.6, 2.5, 2.7), Bound(2.6), 1.0, "inconclusive"),
        (Spread(2.4, 2.3, 2.5), Bound(2.6), 1.2, "inconclusive"),
        (Spread(8, 7.5, 9), Bound(7, at_least=True), 1.0, "met"),
        (Spread(6, 5, 6.9), Bound(7, at_least=True), 1.0, "missed"),
    ],
)
def test_goals_are_judged_by_the_whole_interval(spread: Spread, bound: Bound, steady: float, verdict: str) -> None:
    gpu = Setting(torch.device("cuda"), None, False, 0.0)
    row = measured("x", spread, "ms", gpu, bound=bound, steady=steady)
    assert (row.goal, row.verdict) == (str(bound), verdict)
    assert measured("x", spread, "ms", setting(), bound=bound).verdict == "not run", "a CPU is not judged"


def steady_row(run: Setting) -> Iterator[Row]:
    yield measured("number", 3.0, "ms", run)
    yield checked("check", 0, "differ", "none", True)


def failing(run: Setting) -> Iterator[Row]:
    yield measured("number", 3.0, "ms", run)
    raise ValueError("two\nlines")


def dying(run: Setting) -> Iterator[Row]:
    yield measured("number", 3.0, "ms", run)
    os._exit(1)


def hanging(run: Setting) -> Iterator[Row]:
    yield measured("number", 3.0, "ms", run)
    time.sleep(600)


def impossible(run: Setting) -> Iterator[Row]:
    yield not_run("graphs", "a cpu has none")


def suite(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, **runs: Callable[[Setting], Iterator[Row]]) -> int:
    monkeypatch.setattr(gpu_suite, "SECTIONS", {name: Section(30, run) for name, run in runs.items()})
    return gpu_suite.main(["--device", "cpu", "--out", str(out), *words])


def rows_of(out: Path) -> list[dict[str, str]]:
    with out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_section_that_fails_is_a_row_and_does_not_end_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.csv"
    assert suite(monkeypatch, out, failing=failing, dying=dying, steady=steady_row) == 1
    rows = rows_of(out)
    found = [(row["section"], row["quantity"], row["verdict"]) for row in rows]
    assert found == [
        ("failing", "number", ""),
        ("failing", "the section", "FAILED"),
        ("dying", "number", ""),
        ("dying", "dying", "FAILED"),
        ("steady", "number", ""),
        ("steady", "check", "ok"),
    ]
    assert rows[1]["note"] == "ValueError: two lines"
    assert "FAILED: failing: the section: ValueError: two lines" in capsys.readouterr().out
    for row in rows:
        assert row["command"] == "python -m benchmarks.gpu_suite --device cpu"
        assert all(row[name] for name in ("date", "commit", "sources", "hardware", "torch", "section_seconds"))


def test_what_is_there_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "gpu.csv", []

    class Inline:
        def rows(self, name: str, run: Callable[[Setting], Iterator[Row]], at: Setting) -> Iterator[Row]:
            calls.append(name)
            yield from run(at)

        def end(self) -> None: ...

    monkeypatch.setattr(gpu_suite, "Worker", Inline)
    runs = {"steady": steady_row, "impossible": impossible}
    assert suite(monkeypatch, out, **runs) == 0
    assert suite(monkeypatch, out, **runs) == 0
    assert calls == ["steady", "impossible"], "not even what this device cannot do"
    assert suite(monkeypatch, out, "--again", "--section", "steady", **runs) == 0
    assert calls == ["steady", "impossible", "steady"]
    assert len(rows_of(out)) == 3
    monkeypatch.setattr(gpu_suite, "digest_of_sources", lambda: "changed")
    suite(monkeypatch, out, "--section", "impossible", **runs)
    assert calls[3:] == ["impossible"]
    assert suite(monkeypatch, out, "--seconds", "1", **runs) == 0
    assert calls[4:] == [], "nothing is begun without time"
    assert [row["verdict"] for row in rows_of(out) if row["section"] == "steady"] == ["not run"]
    suite(monkeypatch, out, **runs)
    assert calls[4:] == ["steady"], "what lacked the time is run"


def test_a_section_that_hangs_is_ended_and_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_worker.GRACE", 0)
    taken: dict[str, list[Row]] = {}
    for seconds in (10, 100):  # a process that starts on a busy machine may need more than the first
        sections = {"hanging": Section(seconds, hanging)}
        gpu_suite.run_sections(sections, setting(), lambda name, rows, seconds: taken.update({name: rows}))
        if len(taken["hanging"]) == 2:
            break
    assert [row.quantity for row in taken["hanging"]] == ["number", "the rest of hanging"]
    assert taken["hanging"][-1].note.startswith("no time was left")


def test_sections_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in gpu_suite.SECTIONS)
    assert len(gpu_suite.SECTIONS) <= 12
    with pytest.raises(SystemExit):
        gpu_suite.main(["--section", "nothing"])
    assert "got nothing" in capsys.readouterr().err
    assert gpu_suite.chosen("sync,kernels") == ["kernels", "sync"]
    assert gpu_suite.TOTAL < 9 * 60


def test_a_device_names_its_file() -> None:
    assert gpu_suite.slug("NVIDIA H200") == "nvidia_h200"


@pytest.mark.parametrize("run", [gpu_cells.ladder, gpu_cells.reference, gpu_cells.resnet, gpu_machine.machine])
def test_cells_run_on_a_cpu(run: Callable[[Setting], Iterator[Row]]) -> None:
    rows = list(run(setting()))
    assert rows
    assert {row.verdict for row in rows} <= {"", "ok", "not run"}
    for row in rows:
        assert row.verdict == "not run" or float(row.low) <= float(row.value) <= float(row.high), row


def test_goals_of_the_issue_are_those_of_the_rows() -> None:
    """What a fast enough GPU would be held to, by quantity."""
    goals = {row.quantity: row.goal for row in gpu_cells.reference(setting()) if row.goal}
    assert goals["reference over ours"] == ">= 7"
    assert goals["evaluations of a run"] == "<= 0.02"
    assert goals["a paper's run"] == "<= 12"
    bounds = {row.quantity: row.goal for row in gpu_parts.operations(setting()) if row.goal}
    assert bounds["bank_push, reference"] == "<= 20"
    assert [goal for goal in bounds.values() if goal == ">= 2,000,000"]
    gpu = Setting(torch.device("cuda"), None, False, 0.0)
    row = dict.fromkeys([*gpu_cells.FOUND_OF_CELL, "over_eager_ratio", "tflop_per_second", "gb_per_second"], "")
    row |= dict.fromkeys(["floor_percent", "peak_mib", "reserved_mib", "ready_seconds"], "")
    row |= {"status": "measured", "rung": "graph-compile-bf16", "rows": 256, "model": "wrn_28_2", "n": 11}
    row |= {"same_over_same_ratio": "1", "launches": "250", "waits": "0"}
    for column, value in (("step_ms", "2.5"), ("views_share", "0.04"), ("over_eager_ratio", "1.5")):
        row |= {column: value, f"{column}_low": value, f"{column}_high": value}
    found = {one.quantity: (one.goal, one.verdict) for one in gpu_cells.cell_rows(row, "cell", gpu)}
    assert found["cell, step_ms"] == ("<= 2.6", "met")
    assert found["cell, views_share"] == ("<= 0.05", "met")
    assert found["cell, over eager"] == (">= 2", "missed")
    assert found["cell, waits"] == ("<= 0", "met")
    (memory,) = (x for x in gpu_cells.memory_rows((700.0, 900.0), (1000.0, 1200.0), gpu) if x.goal)
    assert (memory.goal, memory.verdict) == ("<= 0.6", "missed")
