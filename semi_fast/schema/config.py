"""The whole configuration of a run, and what must hold between its parts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from semi_fast.schema import semi
from semi_fast.schema.data import AugmentConfig, BatchConfig, DataConfig
from semi_fast.schema.engine import CheckpointConfig, EngineConfig, EvalConfig, LogConfig
from semi_fast.schema.method import MethodConfig
from semi_fast.schema.model import EmaConfig, ModelConfig, OptimConfig
from semi_fast.schema.split import SplitConfig


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; written to the run directory, and loads back equal."""

    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Arithmetic of the network; auto takes accelerate's choice. fp64 is for tests of equality."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    seed: int = 0
    """Key of every random draw of the run."""
    run_dir: str | None = None
    """Where the run is written; empty: a fresh directory under runs/."""
    resume: str = "none"
    """`none`; `auto`: from the newest whole checkpoint in run_dir, or from the start; or a checkpoint directory."""


def plain(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries and lists, as YAML holds it."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(entry) for key, entry in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return listed(asdict(config))


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary as dotted leaves; an empty dictionary is one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat


def identity(config: Config) -> dict[str, Any]:
    """The part that decides the trained weights: what a resumed run must share."""
    kept = plain(config)
    for key in ("run_dir", "resume", "log", "checkpoint", "device", "data"):  # the data's digest stands for the last
        del kept[key]
    del kept["engine"]["timeout_seconds"]  # of a run that goes well it decides nothing
    return kept


def check(config: Config) -> None:
    """Raise ValueError with one line (rule; value; way out) for the first rule that the configuration breaks."""
    c = config
    la = c.method.la
    rules = [
        (bool(c.data.path), "data.path must name a prepared data set (see semi-fast prepare); it is empty"),
        (c.optim.steps >= 1, f"optim.steps must be at least 1; got {c.optim.steps}"),
        (
            1 <= c.eval.every <= c.optim.steps,
            f"eval.every must lie in 1..optim.steps; got {c.eval.every} and {c.optim.steps} steps",
        ),
        (c.eval.batch is None or c.eval.batch >= 1, f"eval.batch must be at least 1; got {c.eval.batch}"),
        (c.log.every >= 1, f"log.every must be at least 1; got {c.log.every}"),
        (c.checkpoint.every >= 0, f"checkpoint.every must not be negative; got {c.checkpoint.every}"),
        (c.checkpoint.keep >= 1, f"checkpoint.keep must be at least 1; got {c.checkpoint.keep}"),
        (c.batch.labeled >= 1, f"batch.labeled must be at least 1; got {c.batch.labeled}"),
        (c.batch.unlabeled_ratio >= 1, f"batch.unlabeled_ratio must be at least 1; got {c.batch.unlabeled_ratio}"),
        (c.optim.lr > 0, f"optim.lr must be positive; got {c.optim.lr}"),
        (0 <= c.optim.momentum < 1, f"optim.momentum must lie in [0, 1); got {c.optim.momentum}"),
        (c.optim.weight_decay >= 0, f"optim.weight_decay must not be negative; got {c.optim.weight_decay}"),
        (0 <= c.ema.decay < 1, f"ema.decay must lie in [0, 1); got {c.ema.decay}"),
        (
            c.model.bn_momentum is None or 0 < c.model.bn_momentum <= 1,
            f"model.bn_momentum must lie in (0, 1]; got {c.model.bn_momentum}",
        ),
        (c.augment.cutout >= 0, f"augment.cutout must not be negative; got {c.augment.cutout}"),
        (0 <= c.augment.operations <= 8, f"augment.operations must lie in 0..8; got {c.augment.operations}"),
        (c.method.epoch_steps >= 1, f"method.epoch_steps must be at least 1; got {c.method.epoch_steps}"),
        (
            not (c.method.plugins and c.method.name == "semi"),
            "method.plugins stack on supervised and fixmatch; method.name is semi, which has its own balanced head",
        ),
        (
            len(set(c.method.plugins)) == len(c.method.plugins),
            f"method.plugins must not repeat a name; got {list(c.method.plugins)}",
        ),
        (
            not ("la" in c.method.plugins and la.train and la.predict),
            "method.la.train and method.la.predict correct the same prior twice; set one of them to false",
        ),
        (
            0 < c.method.fixmatch.threshold <= 1,
            f"method.fixmatch.threshold must lie in (0, 1]; got {c.method.fixmatch.threshold}",
        ),
        (
            c.method.fixmatch.strong_views >= 1,
            f"method.fixmatch.strong_views must be at least 1; got {c.method.fixmatch.strong_views}",
        ),
        (
            min(la.strength, c.method.fixmatch.unlabeled_weight) >= 0,
            "method.la.strength and method.fixmatch.unlabeled_weight must not be negative; got "
            f"{la.strength} and {c.method.fixmatch.unlabeled_weight}",
        ),
        (c.run_dir != "", "run_dir must name a directory; it is empty: give one, or null for a fresh one under runs/"),
        (
            c.resume != "auto" or c.run_dir is not None,
            "resume auto needs run_dir, the run to go on with; got null: set run_dir",
        ),
        (0 <= c.seed < 2**64, f"seed must lie in 0..2**64 - 1; got {c.seed}"),
    ]
    if c.method.name == "semi":
        rules += semi.rules(
            c.method.semi,
            unlabeled_ratio=c.batch.unlabeled_ratio,
            epoch_steps=c.method.epoch_steps,
            steps=c.optim.steps,
        )
    rules += [
        (math.isfinite(value), f"{key} must be finite; got {value}")
        for key, value in leaves(plain(c)).items()
        if isinstance(value, float)
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(message)
