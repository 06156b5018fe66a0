"""Configuration of the loop: when it logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How a step is carried out; what it computes is the same but for rounding."""

    level: Literal["auto", "eager", "compile", "graph"] = "auto"
    """eager; compile: forward and loss by torch.compile; graph: that, and the whole step as one CUDA graph. `auto` is
    graph on a GPU and eager on a CPU, and falls back with a line that says why."""
    autotune: bool = False
    """Let torch.compile try more kernels; minutes at the first start."""
    channels_last: bool = True
    """Keep activations NHWC in memory."""
    ddp_parameters: int = 10_000_000
    """Parameters from which on an eager step of several processes exchanges gradients by DDP while the backward goes
    on; with fewer, and at the other levels, all at once behind it."""
    timeout_seconds: int = 600
    """How long a process waits for the others before it gives up; a compiler must be done in it."""
    deterministic: bool = False
    """Choose convolutions and compiled code by rule, not by timing, so that a run on the same GPU and versions repeats
    bit for bit; slower."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of the averaged weights."""

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    batch: int | None = None
    """Images per evaluation forward, over all processes; empty: 512 on a GPU, 64 on a CPU, whose caches hold those."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under the run directory."""

    every: int = 5000
    """Steps between checkpoints; 0 for none but the last."""
    keep: int = 2
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class LogConfig:
    """Progress and trackers."""

    every: int = 100
    """Steps between progress lines; between them, evaluations and checkpoints the loop never waits for the device."""
    track: tuple[str, ...] = ()
    """accelerate's trackers to report to, such as [tensorboard] or [wandb], each installed; TensorBoard, W&B, Aim and
    DVCLive write under `trackers/` in the run directory."""
