"""Collect finished runs into a CSV: `python -m benchmarks.accuracy RUN [RUN ...] --out FILE`."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from datetime import date
from pathlib import Path
from typing import Any

from semi_fast.screen import tolerate_closed_pipes

SCORES = (
    "top1_last20",
    "balanced_accuracy_last20",
    "many_last20",
    "medium_last20",
    "few_last20",
    "geometric_mean_last20",
    "top1_final",
    "balanced_accuracy_final",
)
COSTS = ("seconds", "training_seconds", "cpu_seconds", "images_per_second", "rows_per_second")
PROVENANCE = ("precision", "device", "hardware", "threads", "processes", "commit", "manifest_sha256", "split_sha256")
LOCAL_FLAGS = ("--data.path", "--run_dir", "--data-path", "--run-dir")


def command(words: list[str]) -> str:
    """The command as anyone can repeat it: without the places of data and run."""
    kept, skip = ["semi-fast"], False
    for word in words[1:]:
        if skip or word.split("=")[0] in LOCAL_FLAGS:
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    return shlex.join(kept)


def row(run_dir: Path) -> dict[str, Any]:
    """One line of the table; ValueError if the run is not finished."""
    summary, environment = (json.loads((run_dir / name).read_text()) for name in ("summary.json", "env.json"))
    if summary["status"] != "finished":
        raise ValueError(f"{run_dir} is not finished; let it end, then collect it")
    return {
        "date": date.fromtimestamp((run_dir / "summary.json").stat().st_mtime).isoformat(),
        "method": "+".join([summary["method"], *summary["plugins"]]),
        "protocol": summary["protocol"],
        "seed": summary["seed"],
        "head": summary["predicts"],
        "averaged": summary["averaged"],
        **{name: f"{summary[name]:.2f}" for name in (*SCORES, *COSTS)},
        "best_top1_selected_on_test": f"{summary['best']['top1']:.2f}",
        **{name: summary[name] for name in PROVENANCE},
        "torch": summary["versions"]["torch"],
        "python": summary["versions"]["python"],
        "command": command(environment["command"]),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as the README shows them."""
    head = ("method", "balanced accuracy", "many", "medium", "few", "last evaluation", "minutes", "CPU minutes")
    lines = [head, ("---", *["---:"] * (len(head) - 1))]
    for row in rows:
        scores = [row[f"{name}_last20"] for name in ("balanced_accuracy", "many", "medium", "few")]
        shown = [f"{float(value):.1f}" for value in (*scores, row["balanced_accuracy_final"])]
        minutes = [f"{float(row[name]) / 60:.1f}" for name in ("seconds", "cpu_seconds")]
        lines.append((row["method"], *shown, *minutes))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    rows = [row(run_dir) for run_dir in arguments.runs]
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    with tolerate_closed_pipes():
        main()
