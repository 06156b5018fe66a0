"""The stages that a plug-in may change; each does nothing unless overridden."""

from __future__ import annotations

from torch import Tensor

from semi_fast.methods.base import Environment, State


class Plugin:
    """A change to some stages of a method; several are applied in the order in which they are listed."""

    adjusts_prediction = False
    """Whether `logits` does anything; the head that is predicted with is then called `adjusted_head`."""

    def init(self, env: Environment) -> State:
        """State under names that begin with the plug-in's own."""
        return {}

    def label_logits(self, state: State, logits: Tensor) -> Tensor:
        """Logits of labeled rows [B, C] on their way into the loss."""
        return logits

    def adjust(self, state: State, logits: Tensor) -> Tensor:
        """Logits of the weak view [U, C] on their way to pseudo-labels."""
        return logits

    def logits(self, state: State, logits: Tensor) -> Tensor:
        """Logits [N, C] on their way to evaluation."""
        return logits
