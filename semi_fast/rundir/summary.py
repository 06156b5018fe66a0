"""The numbers of a finished run: what `summary.json` holds."""

from __future__ import annotations

from typing import Any

from semi_fast.batch import RowLayout
from semi_fast.prepared.manifest import Manifest, Split
from semi_fast.rundir.runlog import Clock, MetricsFile
from semi_fast.rundir.scores import AVERAGED, SCORES, headline
from semi_fast.schema.config import Config, leaves, plain

RUN_KEYS = ("batch.", "augment.", "model.", "method.", "optim.", "ema.", "eval.every")


def protocol(config: Config, manifest: Manifest) -> str:
    """What must be equal for two results to be comparable, in one line."""
    s, b = config.split, config.batch
    labeled = f"N1={s.labeled_max}" if s.labeled_fraction is None else f"{s.labeled_fraction:g} of each class labeled"
    split = f"split file {s.file}" if s.file else (
        f"rule {s.rule} {labeled} M1={s.unlabeled_max} gamma_l={s.imbalance_labeled:g} "
        f"gamma_u={s.imbalance_unlabeled:g} {s.unlabeled_shape} split seed {s.seed}"
    )  # fmt: skip
    return (
        f"{manifest.dataset} {manifest.resolution[0]} px, {split}; {config.model.name}, batch {b.labeled}, "
        f"mu {b.unlabeled_ratio}, {config.optim.steps} steps, EMA {config.ema.decay:g}, {config.precision}"
    )


def deviations(config: Config) -> list[dict[str, Any]]:
    """Every constant that differs from the published recipe, which is the schema's default."""
    run, paper = leaves(plain(config)), leaves(plain(Config()))
    mine = f"method.{config.method.name}."
    names = {"method.epoch_steps", *(k for k in run if k.startswith(mine))}
    if config.method.plugins:
        names |= {k for k in run if any(k.startswith(f"method.{p}.") for p in config.method.plugins)}
    keys = [k for k in run if k.startswith(RUN_KEYS) and (not k.startswith("method.") or k in names)]
    return [{"key": key, "run": run[key], "paper": paper[key]} for key in keys if run[key] != paper[key]]


def averages(evaluations: list[dict[str, Any]], head: str) -> dict[str, float | None]:
    """`*_final` of the last evaluation and `*_last20`, the headline."""
    found: dict[str, float | None] = {}
    for score in SCORES:
        series = [evaluation["heads"][head][score] for evaluation in evaluations]
        found |= {f"{score}_final": series[-1], f"{score}_last20": headline(series)}
    return found


def summarise(
    config: Config,
    manifest: Manifest,
    split: Split,
    environment: dict[str, Any],
    metrics: MetricsFile,
    clock: Clock,
    layout: RowLayout,
) -> dict[str, Any]:
    """Everything that a table needs of a run, in percent and seconds."""
    records = metrics.records("eval")
    tests = [record for record in records if record["split"] == "test"]
    validations = [record for record in records if record["split"] == "validation"]
    predicts = tests[-1]["predicts"]
    best = max(tests, key=lambda record: record["heads"][predicts]["top1"])  # the first of equals
    per_second = config.optim.steps * environment["processes"] / max(clock.training, 1e-9)
    summary = {
        "method": config.method.name,
        "plugins": list(config.method.plugins),
        "protocol": protocol(config, manifest),
        "dataset": manifest.dataset,
        "class_names": list(manifest.class_names),
        "labeled_counts": list(split.labeled_counts),
        "unlabeled_counts": None if split.unlabeled_counts is None else list(split.unlabeled_counts),
        "test_counts": manifest.counts["test"],
        "steps": config.optim.steps,
        "seconds": clock.total,
        "training_seconds": clock.training,
        "cpu_seconds": clock.cpu,
        "images_per_second": per_second * layout.images,
        "rows_per_second": per_second * layout.total,
        "predicts": predicts,
        "evaluations": len(tests),
        "averaged": min(AVERAGED, len(tests)),
        **averages(tests, predicts),
        "best": {"top1": best["heads"][predicts]["top1"], "step": best["step"], "selected_on": "test"},
        "heads": {head: averages(tests, head) for head in tests[-1]["heads"]},
        "validation": None,
        "shortened": deviations(config),
        "split_sha256": split.sha256,
        "manifest_sha256": manifest.sha256,
        "seed": config.seed,
        "status": "finished",
        **{
            key: environment[key]
            for key in (
                "processes", "threads", "precision", "device", "hardware", "commit", "versions", "bit_exact",
                "changed_on_resume",
            )
        },
    }  # fmt: skip
    if validations:
        chosen = max(validations, key=lambda record: record["heads"][predicts]["balanced_accuracy"])
        at = next(record for record in tests if record["step"] == chosen["step"])
        summary["validation"] = {
            "selected_on": "validation",
            "step": chosen["step"],
            "balanced_accuracy": chosen["heads"][predicts]["balanced_accuracy"],
            "test_top1": at["heads"][predicts]["top1"],
            "test_balanced_accuracy": at["heads"][predicts]["balanced_accuracy"],
        }
    return summary
