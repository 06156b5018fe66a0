"""Two processes equal one: the same samples, pseudo-labels and bank, and weights equal to rounding in float64."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .libraries import needs
from .tiny import ARGUMENTS

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "semi_fast.train"]
SINGLE = [sys.executable, "-m", "semi_fast.train"]


def train(launch: list[str], data: Path, run_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    arguments = [*ARGUMENTS, f"--data.path={data}", f"--run_dir={run_dir}", "--precision=fp64", *flags]
    return subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=280)


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict], int]:
    tensors = load_file(run_dir / "checkpoints" / "step_000000012" / "state.safetensors")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return tensors, records, json.loads((run_dir / "env.json").read_text())["processes"]


@pytest.fixture(scope="module")
def one(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = train(SINGLE, digits, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def greatest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Over weights, momenta, averages and state: the largest |a - b| of a tensor over its largest |a|."""
    worst = 0.0
    for name, a in one.items():
        if a.is_floating_point() and not name.startswith("interval."):
            scale = a.abs().max().clamp_min(1e-12)
            worst = max(worst, ((a - two[name]).abs().max() / scale).item())
    return worst


def test_two_processes_equal_one(one: Path, digits: Path, tmp_path: Path) -> None:
    done = train(LAUNCH, digits, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    tensors, records, processes = outcome(one)
    tensors_two, records_two, processes_two = outcome(tmp_path / "two")
    assert (processes, processes_two) == (1, 2)
    assert tensors.keys() == tensors_two.keys()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, tensors_two[name]), f"{name} must be equal exactly"
    assert greatest_difference(tensors, tensors_two) < 1e-12  # 12 steps of float64 rounding, summed in another order
    for a, b in zip(records, records_two, strict=True):
        if a["kind"] == "train":
            assert a["pseudo_labels"] == b["pseudo_labels"]
            assert b["terms"] == pytest.approx(a["terms"], rel=1e-11)
        else:
            assert a["heads"] == b["heads"]


@pytest.mark.parametrize(("before", "after"), [(SINGLE, LAUNCH), (LAUNCH, SINGLE)], ids=["1 then 2", "2 then 1"])
def test_a_run_goes_on_with_another_number_of_processes(
    one: Path, digits: Path, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    """The global batch is fixed; equal to rounding, as any number is."""
    flags = ("--checkpoint.every=6", "--checkpoint.keep=9", "--resume=auto")
    done = train(before, digits, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000012")
    done = train(after, digits, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    ours, theirs = outcome(one)[0], outcome(tmp_path / "run")[0]
    assert greatest_difference(ours, theirs) < 1e-12
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not ours[name].is_floating_point())


@pytest.mark.parametrize("source", ["ffcv", "dali"])
def test_two_processes_with_a_container_each_equal_one_in_memory(one: Path, tmp_path: Path, source: str) -> None:
    """Every process reads its own rows."""
    from semi_fast.cli import main

    needs(source)
    assert main(["prepare", "digits", "--out", str(tmp_path / "data"), "--formats", source]) == 0
    done = train(LAUNCH, tmp_path / "data", tmp_path / "two", f"--data.source={source}", "--data.threads=1")
    assert done.returncode == 0, done.stderr
    ours, theirs = outcome(one)[0], outcome(tmp_path / "two")[0]
    assert greatest_difference(ours, theirs) < 1e-12
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not ours[name].is_floating_point())


def test_the_switches_that_speak_across_processes_too(digits: Path, tmp_path: Path) -> None:
    """Totals over the batch, the running prior, and features drawn from the bank."""
    semi = "unlabeled_prior=joint bank_sampling=6 center=feature_ema class_weight_update=ema prior_momentum=0.9"
    switches = [f"--method.semi.{switch}" for switch in semi.split()]
    for launch, name in ((SINGLE, "one"), (LAUNCH, "two")):
        done = train(launch, digits, tmp_path / name, *switches)
        assert done.returncode == 0, done.stderr
    ours, theirs = (outcome(tmp_path / name)[0] for name in ("one", "two"))
    assert greatest_difference(ours, theirs) < 1e-12
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not ours[name].is_floating_point())


def test_gradients_exchanged_during_the_backward_are_the_same(one: Path, digits: Path, tmp_path: Path) -> None:
    """DDP, as large models have it; with the two normalisations of the quirk, which get no gradient."""
    done = train(LAUNCH, digits, tmp_path / "two", "--engine.ddp_parameters=1")
    assert done.returncode == 0, done.stderr
    ours, theirs = outcome(one)[0], outcome(tmp_path / "two")[0]
    assert ours.keys() == theirs.keys()
    assert greatest_difference(ours, theirs) < 1e-12
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not ours[name].is_floating_point())


def test_the_comparison_notices_local_normalisation(one: Path, digits: Path, tmp_path: Path) -> None:
    done = train(LAUNCH, digits, tmp_path / "two", "--model.bn=local")
    assert done.returncode == 0, done.stderr
    assert greatest_difference(outcome(one)[0], outcome(tmp_path / "two")[0]) > 1e-6


def test_a_batch_that_two_processes_do_not_divide(digits: Path, tmp_path: Path) -> None:
    done = train(LAUNCH, digits, tmp_path / "two", "--batch.labeled=7")
    assert done.returncode != 0
    assert "batch.labeled must be divisible by the number of processes; got 7 and 2" in done.stderr
    assert not (tmp_path / "two").exists() or not any((tmp_path / "two").iterdir())
