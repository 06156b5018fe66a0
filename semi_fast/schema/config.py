"""The whole configuration of a run, and what must hold between its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from semi_fast.schema import ranges, semi, split
from semi_fast.schema.data import AugmentConfig, BatchConfig, DataConfig
from semi_fast.schema.engine import CheckpointConfig, EngineConfig, EvalConfig, LogConfig
from semi_fast.schema.method import MethodConfig
from semi_fast.schema.model import EmaConfig, ModelConfig, OptimConfig
from semi_fast.schema.split import SplitConfig

MOST_IMAGES = 2**22
"""Of a step; beyond what memory holds."""


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
    """`none`; `auto`: from the newest whole checkpoint in run_dir, or from the start; or a checkpoint directory. As a
    flag also a run directory: `--resume RUN` is enough to go on with it."""


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
    ranges.must_hold(rules(config))


def rules(config: Config) -> Iterator[tuple[bool, str]]:
    """(holds, message) of everything that must hold in a run: every number in its range, then what concerns several."""
    c = config
    la = c.method.la
    yield bool(c.data.path), "data.path must name a prepared data set (see semi-fast prepare); it is empty"
    yield from split.rules(c.split)
    yield from ranges.rules(leaves(plain(c)))
    yield (
        c.eval.every <= c.optim.steps,
        f"eval.every must be at most optim.steps; got {c.eval.every} and {c.optim.steps} steps",
    )
    rows = c.batch.labeled * (1 + c.batch.unlabeled_ratio)
    yield (
        rows <= MOST_IMAGES,
        f"batch.labeled * (1 + batch.unlabeled_ratio) must be at most {MOST_IMAGES} images; got {rows}",
    )
    yield (
        not (c.method.plugins and c.method.name in ("semi", "released_semi")),
        f"method.plugins stack on supervised and fixmatch; method.name is {c.method.name}, with its own balanced head",
    )
    yield (
        len(set(c.method.plugins)) == len(c.method.plugins),
        f"method.plugins must not repeat a name; got {list(c.method.plugins)}",
    )
    yield (
        not ("la" in c.method.plugins and la.train and la.predict),
        "method.la.train and method.la.predict correct the same prior twice; set one of them to false",
    )
    yield (
        c.run_dir != "",
        "run_dir must name a directory; it is empty: give one, or null for a fresh one under runs/",
    )
    yield (
        c.resume != "auto" or c.run_dir is not None,
        "resume auto needs run_dir, the run to go on with; got null: set run_dir, or --resume RUN",
    )
    if c.method.name in ("semi", "released_semi"):
        yield from semi.rules(
            c.method.name,
            getattr(c.method, c.method.name),
            unlabeled_ratio=c.batch.unlabeled_ratio,
            epoch_steps=c.method.epoch_steps,
            steps=c.optim.steps,
        )
