"""Configuration of the network, the optimizer and the average of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network under the classifiers."""

    name: str = "wrn_28_2"
    """A model of ours (wrn_28_2, wrn_28_8, wrn_16_2, wrn_10_2, wrn_10_1, resnet50_cifar) or any timm model."""
    bn_momentum: float | None = 0.001
    """Momentum of the batch-normalisation statistics, in torch's convention; empty: the model's own."""
    bn: Literal["sync", "local"] = "sync"
    """With several processes: statistics over the global batch (equal to one process), or over each process's
    rows: then the first process's are evaluated and saved."""
    wrn_quirk: bool = True
    """Wide residual networks: the first unit of groups 2 and 3 skips its first normalisation, as in published code."""


@dataclass(frozen=True)
class OptimConfig:
    """SGD with Nesterov momentum and the 7/16 cosine."""

    steps: int = 250_000
    """Optimizer updates of the whole run (T)."""
    lr: float = 0.03
    """Learning rate at step 0; update t uses lr * cos(7 pi t / 16 T)."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on weights of two or more axes; never on biases and normalisation."""


@dataclass(frozen=True)
class EmaConfig:
    """The averaged weights that are evaluated."""

    decay: float = 0.999
    """Decay of the average per step."""
    ramp: bool = False
    """Use min(decay, 1 - 1 / (t + 1)) at step t, so that short runs forget the initial weights."""
