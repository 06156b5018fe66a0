"""A small run on the digits, `tiny.yaml`: its arguments, and what several tests do with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from semi_fast.schema.arguments import key_of, read_arguments
from semi_fast.schema.config import Config

from .conftest import DEVICE

FILE = Path(__file__).with_name("tiny.yaml")
ARGUMENTS = [f"--config={FILE}"]


def config(data: Path, run_dir: Path | None, *flags: str, **top: Any) -> Config:
    """The tiny configuration with flags on top, with or without effect; of two for one key, the later one."""
    where = [] if run_dir is None else [f"--run_dir={run_dir}"]
    given = {key_of(flag): flag for flag in (f"--data.path={data}", *where, *flags)}
    return replace(read_arguments([*ARGUMENTS, *given.values()])[0], **top)


def on_device(data: Path, run_dir: Path | None, *flags: str, **top: Any) -> Config:
    """The same on a GPU where there is one, and there as repeatable as on a CPU."""
    exact = ["--engine.deterministic=true"] if DEVICE.type == "cuda" else []
    return config(data, run_dir, *exact, *flags, device=DEVICE.type, **top)
