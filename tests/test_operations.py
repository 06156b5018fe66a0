"""What a step costs, by counts that no other load on the machine can change."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import METHODS, parts
from semi_fast.models import make_classifier
from semi_fast.schema.model import ModelConfig

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "operations.csv"
COUNTED = ("eager", "outside_compiled", "waits")


def recorded() -> dict[str, dict[str, str]]:
    with RESULTS.open(newline="") as file:
        return {row["loop"]: row for row in csv.DictReader(file)}


@pytest.mark.interpreted
@pytest.mark.parametrize("method", METHODS)
def test_no_step_dispatches_more_than_is_recorded(method: str) -> None:
    """More is a decision: then `python -m benchmarks.operations` writes the file again."""
    found, budget = parts(METHODS[method]), recorded()[method]
    assert found["waits"] == 0
    for name in COUNTED:
        assert found[name] <= int(budget[name]), f"{name}: {found}"


@pytest.mark.parametrize(("model", "classes", "gflop"), [("wrn_28_2", 10, 0.4287), ("resnet50_cifar", 127, 2.5967)])
def test_arithmetic_of_the_published_models(model: str, classes: int, gflop: float) -> None:
    """Of one forward of one image of 32 pixels, 2 per multiply-add, two heads."""
    network = make_classifier(ModelConfig(name=model), classes, ("head", "balanced_head"), (32, 32))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=5e-5)


SLOW = {"torch", "torchvision", "timm", "numpy", "accelerate", "jsonargparse", "yaml", "rich", "PIL", "jinja2"}


@pytest.mark.parametrize("words", [["-c", "import semi_fast"], ["-m", "semi_fast.cli", "--help"]], ids=" ".join)
def test_the_package_and_its_help_start_at_once(words: list[str]) -> None:
    """By what they import: a clock would tell of the machine."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "semi_fast" in imported
    assert imported & SLOW == set()


def test_the_readme_says_what_is_recorded() -> None:
    text = " ".join((RESULTS.parents[2] / "README.md").read_text(encoding="utf-8").split())
    ours, released = recorded()["semi"], recorded()["semi, reference loop"]
    assert (
        f"A step of SeMi dispatches {ours['eager']} operations with the kernels of a GPU and waits for nothing" in text
    )
    assert f"{int(released['eager']):,} and waits {released['waits']} times while its bank fills" in text
