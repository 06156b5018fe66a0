"""What a method is: a declaration of needs and pure tensor functions over a fixed-shape state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from semi_fast.batch import Outputs, Rows

State = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What the step must provide."""

    strong_views: int = 0
    """Strong views per unlabeled image (S); with `unlabeled` false there are none."""
    unlabeled: bool = False
    """Whether unlabeled images are read at all."""
    heads: tuple[str, ...] = ("head",)
    """Linear classifiers on the features."""


@dataclass(frozen=True)
class Environment:
    """What a method may know when it makes its state."""

    labeled_counts: tuple[int, ...]
    """Labeled images per class; every class has at least one."""
    features: int
    """D."""
    device: torch.device
    dtype: torch.dtype
    """float32, or float64 where the run is in float64."""
    first_visit_counts: tuple[int, ...] = ()
    """Labeled images per class in the full batches of the first visit."""

    @property
    def classes(self) -> int:
        return len(self.labeled_counts)

    def log_prior(self, strength: float) -> Tensor:
        """strength * log of the labeled class prior, [C]; made in float64 as log(prior ** strength + 1e-12)."""
        return log_power(class_prior(self.labeled_counts, self.device), strength).to(self.dtype)


class Loss(NamedTuple):
    """What `Method.loss` gives."""

    total: Tensor
    """Scalar to minimise: a mean over this process's rows, so that the mean over processes is that of the batch."""
    terms: dict[str, Tensor]
    """The named parts of `total`, as they enter it."""
    pending: State
    """Detached, one entry per unlabeled image [U, ...]: what `update` needs. `pseudo_label` int64 and `mask` bool, if
    given, also feed the diagnostics."""
    stats: dict[str, Tensor]
    """Scalars worth a curve; averaged over the log interval and over processes."""
    totals: State = {}  # noqa: RUF012, never changed
    """Detached; summed over processes, then handed to `update` with `pending`."""


class Method(Protocol):
    """The interface of every method. No function reads a value back to the host or branches on one."""

    @property
    def needs(self) -> Needs: ...

    @property
    def predicts(self) -> str:
        """The head whose logits are the prediction."""
        ...

    def init(self, env: Environment) -> State:
        """The state: fixed shapes, saved and restored by name, the same on all processes."""
        ...

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        """The loss of one forward at `step` (int64 scalar); reads the state and leaves it."""
        ...

    def update(self, state: State, pending: State, step: Tensor) -> None:
        """Change the state in place; `pending` holds the rows of the whole batch, in the order of one process, and the
        totals."""
        ...

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        """The logits [N, C] that are evaluated."""
        ...


def class_prior(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Each class's share of the images, float64 [C]."""
    images = torch.tensor(counts, dtype=torch.float64, device=device)
    return images / images.sum()


def log_power(prior: Tensor, strength: float) -> Tensor:
    """log(prior ** strength + 1e-12), in the prior's type; zeros for strength 0."""
    return (prior**strength + 1e-12).log() if strength else torch.zeros_like(prior)


def fraction(mask: Tensor) -> Tensor:
    """The mean of a bool tensor."""
    return mask.float().mean()
