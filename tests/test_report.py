"""The report: what it shows, what it refuses, and that a page needs nothing but itself."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from semi_fast.report import write_report
from semi_fast.report.compare import comparison
from semi_fast.report.run import METRICS, read_run


def metrics_of(confusion: np.ndarray) -> dict:
    """What the engine writes of one head, from counts [C, C]."""
    recall = 100 * np.diag(confusion) / confusion.sum(1)
    third = len(recall) // 3
    return {
        "top1": 100 * np.trace(confusion) / confusion.sum(),
        "balanced_accuracy": recall.mean(),
        "geometric_mean": np.exp(np.log(np.maximum(recall, 1 / len(recall))).mean()),
        "many": recall[:third].mean() if third else None,
        "medium": recall[third : len(recall) - third].mean(),
        "few": recall[len(recall) - third :].mean() if third else None,
        "recall": recall.tolist(),
    }


def fake_run(
    path: Path,
    *,
    method: str = "semi",
    classes: int = 10,
    steps: int = 1000,
    skill: float = 1.0,
    seed: int = 0,
    names: list[str] | None = None,
    finished: bool = True,
) -> Path:
    """A run directory as the engine writes it, of a made-up long-tailed training."""
    random = np.random.default_rng(seed)
    path.mkdir(parents=True)
    names = names or [f"class {k}" for k in range(classes)]
    labeled = np.maximum(1, 500 * 0.01 ** (np.arange(classes) / max(1, classes - 1))).astype(int)
    supervised = method == "supervised"
    heads = ["head"] if method != "semi" else ["head", "balanced_head"]
    records = []
    for step in range(steps // 40, steps + 1, steps // 40):
        grown = 1 - np.exp(-4 * step / steps)
        seen = random.poisson(labeled * 2)
        used = random.binomial(seen, 0.9 * grown * (labeled / labeled.max()) ** 0.15)
        correct = random.binomial(used, 0.35 + 0.6 * grown * (labeled / labeled.max()) ** 0.3)
        predicted = correct + random.poisson((used - correct).sum() * labeled / labeled.sum())
        counts = {"seen": seen, "used": used, "correct": correct, "predicted": predicted}
        terms = {"total": 3 - 2 * grown, "supervised": 2 - 1.5 * grown, "unlabeled": 0.3 * grown}
        if method == "semi":
            terms |= {"balanced_supervised": 1.9 - grown, "balanced_unlabeled": 0.4 * grown, "embedding_alignment": 0.01}
        record = {"kind": "train", "step": step, "seconds": step / 30, "lr": 0.03 * np.cos(7 * np.pi * step / 16 / steps)}
        record |= {"images_per_second": random.normal(900, 20), "rows_per_second": random.normal(2700, 60)}
        record["terms"] = {key: value + random.normal(0, 0.02) for key, value in terms.items()}
        record["stats"] = {"bank_fill": grown, "threshold": 0.95} if method == "semi" else {}
        fraction = {"used_fraction": used.sum() / seen.sum()}
        lists = {key: value.tolist() for key, value in counts.items()}
        record["pseudo_labels"] = None if supervised else fraction | lists
        records.append(record)
        if step % (steps // 20) == 0:
            heads_now = {}
            for index, head in enumerate(heads):
                right = np.clip((0.25 + 0.7 * grown) * (labeled / labeled.max()) ** (0.12 / skill - 0.03 * index), 0, 1)
                chances = np.diag(right) + (1 - right)[:, None] * (labeled / labeled.sum())
                confusion = np.array([random.multinomial(100, row / row.sum()) for row in chances])
                heads_now[head] = metrics_of(confusion)
                if step == steps:
                    heads_now[head]["confusion"] = confusion.tolist()
            records.append({"kind": "eval", "step": step, "split": "test", "predicts": heads[-1], "heads": heads_now})
    evaluated = [record for record in records if record["kind"] == "eval"]
    per_head = {}
    for head in heads:
        there = [record["heads"][head] for record in evaluated]
        means = {f"{key}_last20": np.mean([h[key] for h in there]) for key in METRICS if there[0][key] is not None}
        per_head[head] = means | {f"{key}_final": there[-1][key] for key in METRICS}
    best = max(evaluated, key=lambda record: record["heads"][heads[-1]]["top1"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "config.yaml").write_text(f"method:\n  name: {method}\noptim:\n  steps: {steps}\nseed: {seed}\n")
    (path / "env.json").write_text(json.dumps({"python": "3.11.7", "torch": "2.13.0", "commit": "1f" * 20}))
    (path / "split.json").write_text(json.dumps({"labeled_counts": labeled.tolist(), "sha256": "ab" * 32}))
    summary = {
        "method": method,
        "plugins": ["la"] if method == "supervised" else [],
        "protocol": "digits-lt, N1 = 500, M1 = 1000, imbalance 100 and 100, consistent, rule semi",
        "dataset": "digits",
        "class_names": names,
        "labeled_counts": labeled.tolist(),
        "unlabeled_counts": (2 * labeled).tolist(),
        "test_counts": [100] * classes,
        "steps": steps,
        "seconds": 3723.4 if method == "semi" else 48.25,
        "training_seconds": 3601.2 if method == "semi" else 41.0,
        "images_per_second": 12345.6 if method == "semi" else 987.6,
        "rows_per_second": 37036.8 if method == "semi" else 987.6,
        "predicts": heads[-1],
        "evaluations": len(evaluated),
        "averaged": min(20, len(evaluated)),
        **per_head[heads[-1]],
        "heads": per_head,
        "best": {"top1": best["heads"][heads[-1]]["top1"], "step": best["step"], "selected_on": "test"},
        "validation": None,
        "shortened": [{"key": "ema.decay", "run": 0.99, "paper": 0.999}, {"key": "augment.flip", "run": False, "paper": True}],
        "split_sha256": "ab" * 32,
        "manifest_sha256": "cd" * 32,
        "seed": seed,
        "precision": "fp32",
        "device": "cpu",
        "hardware": "2 cores of a CPU",
        "commit": "1f" * 20,
        "versions": {"torch": "2.13.0"},
        "status": "finished",
    }  # fmt: skip
    if finished:
        (path / "summary.json").write_text(json.dumps(summary))
    return path
