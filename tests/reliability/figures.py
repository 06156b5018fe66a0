"""How many faults a test makes, and the file that tells what came of them."""

from __future__ import annotations

import csv
import os
from datetime import date
from pathlib import Path
from typing import Any

import torch

from semi_fast.rundir import runlog

FULL = os.environ.get("SEMI_FAST_RELIABILITY") == "full"
COMMIT = runlog.commit() if FULL else ""  # before a figure changes the checkout
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "reliability.csv"


def amount(share: int, full: int) -> int:
    """How many: a share of them in CI, all of them in the full run."""
    return full if FULL else share


def record(fault: str, *, made: int, failures: int, goal: str, seconds: float, note: str = "") -> None:
    """Replace the row of `fault` in benchmarks/results/reliability.csv; by a full run alone.

    `made` faults of which `failures` had another outcome than promised; `goal` is what was promised of how many.
    """
    if not FULL:
        return
    row: dict[str, Any] = {
        "fault": fault,
        "made": made,
        "failures": failures,
        "goal": goal,
        "seconds": f"{seconds:.0f}",
        "note": note,
        "date": date.today().isoformat(),
        "commit": COMMIT,
        "hardware": runlog.hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "command": "make test-reliability-full",
    }
    rows = {}
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            rows = {one["fault"]: one for one in csv.DictReader(file)}
    rows[fault] = row
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
