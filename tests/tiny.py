"""A small run on the digits: its arguments, and what several tests do with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from semi_fast.cli import parse_config
from semi_fast.schema.config import Config

from .conftest import DEVICE

ARGUMENTS = """
--split.labeled_max=20 --split.imbalance_labeled=5 --split.unlabeled_max=60 --split.imbalance_unlabeled=5
--batch.labeled=8 --model.name=wrn_10_1 --model.bn_momentum=0.1 --ema.decay=0.9 --ema.ramp=true
--augment.flip=false --augment.cutout=8 --method.epoch_steps=2 --method.semi.warmup_epochs=1
--method.semi.bank_slots=8 --method.semi.bank_decay_every=3 --method.semi.threshold=0.15 --method.fixmatch.threshold=0.3
--optim.lr=0.003 --optim.steps=12 --eval.every=4 --log.every=5 --checkpoint.every=0 --device=cpu --precision=fp32
""".split()  # noqa: SIM905, a command line reads best as one


def config(data: Path, run_dir: Path | None, *flags: str, **top: Any) -> Config:
    """The tiny configuration with flags on top."""
    where = [] if run_dir is None else [f"--run_dir={run_dir}"]
    return replace(parse_config([*ARGUMENTS, f"--data.path={data}", *where, *flags]), **top)


def on_device(data: Path, run_dir: Path | None, *flags: str, **top: Any) -> Config:
    """The same on a GPU where there is one, and there as repeatable as on a CPU."""
    exact = ["--engine.deterministic=true"] if DEVICE.type == "cuda" else []
    return config(data, run_dir, *exact, *flags, device=DEVICE.type, **top)
