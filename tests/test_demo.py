"""The demonstration's configurations say something: every part of SeMi takes part before a demo run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from semi_fast.commands.demo import CONFIGS, METHODS
from semi_fast.schema.arguments import parse_config
from semi_fast.train import run


def test_every_term_of_semi_is_at_work_before_the_demo_ends(digits: Path, tmp_path: Path) -> None:
    config = parse_config([f"--config={CONFIGS / 'semi.yaml'}", f"--data.path={digits}", "--eval.every=400"])
    run(replace(config, run_dir=str(tmp_path / "run")))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    for term in ("supervised", "unlabeled", "balanced_supervised", "balanced_unlabeled", "alignment"):
        assert max(record["terms"][term] for record in train) > 1e-3, f"{term} never acts"
    warmup = config.method.semi.warmup_epochs * config.method.epoch_steps
    assert 0 < warmup <= config.optim.steps / 10
    for record in train:
        active = record["step"] > warmup
        assert (record["terms"]["alignment"] > 0) == active, "alignment begins after the warm-up"
        assert (record["stats"]["hardness"] < 1) == active, "so do the entropy weights"
    assert train[-1]["stats"]["bank_fill"] == 1.0
    evaluation = [record for record in records if record["kind"] == "eval"][-1]
    assert evaluation["heads"]["balanced_head"]["balanced_accuracy"] > 60, "and it learns"


def test_the_demos_differ_in_the_method_alone() -> None:
    configs = [parse_config([f"--config={CONFIGS / name}.yaml"]) for name in METHODS]
    shared = [replace(config, method=configs[0].method) for config in configs]
    assert shared[0] == shared[1] == shared[2]
    assert [config.method.name for config in configs] == ["supervised", "fixmatch", "semi"]
