"""A resumed run needs the tensors of a checkpoint one by one: without any one of them it ends elsewhere."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from semi_fast import checkpoint
from semi_fast.train import guarded, run
from tests.test_engine import records
from tests.tiny import config

from .figures import amount, record
from .forked import forked

SEED = 6
FIRST, LAST = "step_000000006", "step_000000012"
NOT_NEEDED = re.compile(
    r"average\.\S+\.running_(mean|var)"  # copied from the model's in every step
    r"|method\.(head_|pseudo_label_)?adjustment"  # follow from the configuration and the split
    r"|(model|average|momentum)\.backbone\.units\.[12]\.bn1\.\w+"  # of the published network, which never uses them
    r"|interval\.rows"  # here the network is sure of every image: the share of used rows is 1 over any number of them
)
"""Saved, but the same without: all tensors of a state are saved alike."""


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(config(digits, run_dir, "--checkpoint.every=6"))
    return run_dir


def resumed_without(entry: str, digits: Path, run_dir: Path) -> Callable[[], int]:
    """A run that goes on from a checkpoint, but has one tensor as a new run has it."""

    def child() -> int:
        restore = checkpoint.restore

        def forgetful(targets: Iterable[tuple[str, Tensor]], tensors: dict[str, Tensor]) -> None:
            held = dict(targets)
            fresh = {name: target.detach().clone() for name, target in held.items()}
            restore(held.items(), tensors)
            if entry:
                with torch.no_grad():
                    held[entry].copy_(fresh[entry])

        checkpoint.restore = forgetful
        return guarded(config(digits, run_dir, "--checkpoint.every=0", resume="auto"))

    return child


def test_every_single_saved_tensor_is_needed(whole: Path, digits: Path, tmp_path: Path) -> None:
    began, expected = time.monotonic(), checkpoint.load(whole / "checkpoints" / LAST).tensors
    names = sorted(name for name in expected if not NOT_NEEDED.fullmatch(name))
    order = np.random.default_rng(SEED).permutation(len(names))
    chosen = [names[i] for i in order[: amount(4, len(names))]]
    unnoticed = []
    for entry in ["", *chosen]:
        run_dir = tmp_path / "run"
        shutil.copytree(whole, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / LAST)
        ended = forked(resumed_without(entry, digits, run_dir), seconds=120)
        assert ended.code == 0, f"{entry}: {ended}"
        found = checkpoint.load(run_dir / "checkpoints" / LAST).tensors
        same = all(torch.equal(found[name], expected[name]) for name in expected) and records(run_dir) == records(whole)
        shutil.rmtree(run_dir)
        if not entry:
            assert same, "with all of them it ends where the run that went through does"
        elif same:
            unnoticed.append(entry)
    record(
        "one tensor left out of a checkpoint",
        made=len(chosen),
        failures=len(unnoticed),
        goal="every one, each noticed",
        seconds=time.monotonic() - began,
        note=f"{len(expected) - len(names)} of {len(expected)} follow from others or never change",
    )
    assert unnoticed == [], f"seed {SEED}"
