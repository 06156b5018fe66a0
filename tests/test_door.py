"""Where operations run their kernels, and what is said where they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from semi_fast.ops import door
from semi_fast.ops.door import FLOATS, expect
from semi_fast.train import run

from .tiny import config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def missing(name: str) -> object:
    raise ImportError(f"No module named {name!r}")


def triton(version: str) -> Callable[[str], object]:
    return lambda _: SimpleNamespace(__version__=version)


def numba(disabled: int) -> Callable[[str], object]:
    return lambda _: SimpleNamespace(__version__="0.61", config=SimpleNamespace(DISABLE_JIT=disabled))


def test_kernels_need_cuda_and_a_recent_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, obstacle in (
        (triton("3.6.0"), ""),
        (triton("4.0.0+git1"), ""),
        (triton("3.2.0"), "Triton 3.2.0 is older than 3.6"),
        (missing, "Triton cannot be imported (No module named 'triton')"),
    ):
        monkeypatch.setattr(door, "import_module", found)
        assert door.find_obstacle() == obstacle
        monkeypatch.setattr(door, "OBSTACLE", obstacle)
        assert door.has_kernel(CUDA) == (not obstacle)
        assert not door.has_kernel(CPU)
        assert obstacle in door.backend(CUDA)
        if not obstacle:
            assert door.backend(CUDA, 2048).endswith(" kernels")
            assert door.backend(CUDA, 4096).endswith(
                " kernels; 4,096 classes: the reference of pseudo_label (kernel up to 2,048)"
            )
    said = "reference operations, no kernels: Triton cannot be imported (No module named 'triton')"
    assert door.backend(CUDA) == said
    monkeypatch.setattr(door, "find_numba_obstacle", lambda: "it is in the way")
    assert door.backend(CPU) == f"{said}; views not compiled: it is in the way"


def test_a_gpu_without_a_number_gets_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    given = CUDA, torch.device("cuda:1"), CPU
    assert [str(door.numbered(device)) for device in given] == ["cuda:3", "cuda:1", "cpu"]


def test_views_on_a_cpu_are_compiled_where_numba_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, obstacle in (
        (numba(disabled=0), ""),
        (numba(disabled=1), "NUMBA_DISABLE_JIT is set"),
        (missing, "numba cannot be imported (No module named 'numba')"),
    ):
        monkeypatch.setattr(door, "import_module", found)
        assert door.find_numba_obstacle.__wrapped__() == obstacle
        monkeypatch.setattr(door, "find_numba_obstacle", lambda obstacle=obstacle: obstacle)
        assert door.has_compiled_views(CPU) == (not obstacle)
        assert not door.has_compiled_views(CUDA)
        assert door.backend(CPU).endswith(
            f"; views not compiled: {obstacle}" if obstacle else "; views compiled by numba 0.61"
        )
        monkeypatch.undo()


def test_a_run_says_what_its_operations_are(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(digits, tmp_path / "run", "--optim.steps=4"))
    said = json.loads((tmp_path / "run" / "env.json").read_text())["operations"]
    assert said == door.backend(CPU)
    assert said.startswith("reference operations, no kernels: the device is cpu, not CUDA; views ")
    assert capsys.readouterr().out.count(said) == 1


def test_expect_names_the_argument() -> None:
    x = torch.zeros(2, 3)
    expect("x", x, (2, 3), FLOATS, CPU)
    expect("x", x, (None, 3), FLOATS, CPU)
    for shape, dtypes, device, message in (
        ((2, 4), FLOATS, CPU, r"x must have shape \[2, 4\]; got \[2, 3\]"),
        ((None,), FLOATS, CPU, r"x must have shape \[any\]; got \[2, 3\]"),
        ((2, 3), (torch.int64, torch.bool), CPU, "x must be int64 or bool; got float32"),
        ((2, 3), FLOATS, CUDA, "x must be on cuda; got cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            expect("x", x, shape, dtypes, device)
