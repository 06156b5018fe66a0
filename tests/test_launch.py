"""What launchers leave in the environment gets one line that names the variable, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from semi_fast.cli import main
from semi_fast.launch import ALLOWED, NUMBERS, OF_A_PROCESS, check_environment

from .tiny import ARGUMENTS

WHOLE = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
REFUSED = {
    "WORLD_SIZE=": ["WORLD_SIZE is set, RANK, LOCAL_RANK, WORLD_SIZE", "unset WORLD_SIZE"],
    "WORLD_SIZE=2 RANK=0": ["RANK is set, LOCAL_RANK, MASTER_ADDR, MASTER_PORT without", "unset RANK, WORLD_SIZE"],
    "LOCAL_RANK=0": ["LOCAL_RANK is set", "MASTER_ADDR", "unset LOCAL_RANK"],
    f"{WHOLE} MASTER_ADDR=": ["RANK is set, MASTER_ADDR without a value", "unset RANK, LOCAL_RANK, WORLD_SIZE"],
    f"{WHOLE} RANK=1": ["RANK in the environment must be less than WORLD_SIZE; got 1 and 1"],
    f"{WHOLE} WORLD_SIZE=two": ["WORLD_SIZE in the environment must be a whole number; got 'two'"],
    "LOCAL_WORLD_SIZE=": ["LOCAL_WORLD_SIZE in the environment must be a whole number; got ''"],
    "OMPI_COMM_WORLD_SIZE=x": ["OMPI_COMM_WORLD_SIZE in the environment must be a whole number; got 'x'"],
    "OMPI_COMM_WORLD_SIZE=2": ["OMPI_COMM_WORLD_SIZE in the environment must be 1", "got 2: unset it"],
    "PMI_SIZE=4": ["PMI_SIZE in the environment must be 1"],
    "ACCELERATE_USE_DEEPSPEED=true": ["ACCELERATE_USE_DEEPSPEED", "must be false", "got 'true': unset it"],
    "ACCELERATE_USE_FSDP=True": ["ACCELERATE_USE_FSDP", "got 'True': unset it"],
    "ACCELERATE_USE_MEGATRON_LM=1": ["ACCELERATE_USE_MEGATRON_LM"],
    "ACCELERATE_USE_PARALLELISM_CONFIG=true": ["ACCELERATE_USE_PARALLELISM_CONFIG"],
    "ACCELERATE_USE_CPU=maybe": ["ACCELERATE_USE_CPU", "got 'maybe'"],
    "ACCELERATE_TORCH_DEVICE=cuda:0": ["ACCELERATE_TORCH_DEVICE in the environment must not be set"],
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR": ["ACCELERATE_DYNAMO_BACKEND", "must be no, or not be set"],
    "ACCELERATE_DYNAMO_MODE=max-autotune": ["ACCELERATE_DYNAMO_MODE"],
    "ACCELERATE_DYNAMO_USE_DYNAMIC=": ["ACCELERATE_DYNAMO_USE_DYNAMIC", "got ''"],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4": ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "must be 1"],
    "ACCELERATE_MIXED_PRECISION=fp8": ["ACCELERATE_MIXED_PRECISION", "must be no or bf16 or fp16", "got 'fp8'"],
}


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OF_A_PROCESS, *NUMBERS, *ALLOWED):
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for word in words.split():
        monkeypatch.setenv(*word.split("=", 1))  # the last one holds


@pytest.mark.parametrize("left", REFUSED)
def test_a_leftover_is_named(
    left: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, left)
    monkeypatch.setitem(sys.modules, "semi_fast.train", None)  # which takes seconds to load
    assert main(["train", *ARGUMENTS, f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert [words for words in REFUSED[left] if words not in said.err] == [], said.err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_refuses_it_before_it_writes(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, "ACCELERATE_USE_FSDP=true")
    file = tmp_path / "mine.yaml"
    file.write_text(f"data:\n  path: {digits}\n")
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "ACCELERATE_USE_FSDP" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "",
        WHOLE,
        "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 ACCELERATE_USE_CPU=True ACCELERATE_MIXED_PRECISION=bf16 "
        "ACCELERATE_DYNAMO_BACKEND=NO ACCELERATE_DYNAMO_MODE=default ACCELERATE_DYNAMO_USE_DYNAMIC=False",
    ],
    ids=["nothing", "a launcher of several", "accelerate launch of one"],
)
def test_what_launchers_set_is_taken(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, words)
    check_environment()


def test_one_process_where_several_were_asked_for_is_said_first(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch --cpu --num_processes 2` sets just this."""
    put(monkeypatch, "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 ACCELERATE_MIXED_PRECISION=no")
    flags = [f"--data.path={digits}", f"--run_dir={tmp_path / 'run'}", "--optim.steps=4", "--eval.every=4"]
    assert main(["train", *ARGUMENTS, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("note: one process: without --multi_gpu")
