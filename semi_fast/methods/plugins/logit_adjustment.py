"""Logit adjustment: the class prior added to logits in training, or taken off them."""

from __future__ import annotations

from torch import Tensor

from semi_fast.methods.base import Environment, State
from semi_fast.methods.plugins.base import Plugin
from semi_fast.schema.method import LogitAdjustmentConfig


class LogitAdjustment(Plugin):
    """Menon et al. 2021, "Long-tail learning via logit adjustment": three switches, see `LogitAdjustmentConfig`."""

    def __init__(self, options: LogitAdjustmentConfig):
        self.options = options
        self.adjusts_prediction = options.predict

    def init(self, env: Environment) -> State:
        return {"la.adjustment": env.log_prior(self.options.strength)}

    def label_logits(self, state: State, logits: Tensor) -> Tensor:
        return logits + state["la.adjustment"] if self.options.train else logits

    def adjust(self, state: State, logits: Tensor) -> Tensor:
        return logits - state["la.adjustment"] if self.options.pseudo_label else logits

    def logits(self, state: State, logits: Tensor) -> Tensor:
        return logits - state["la.adjustment"] if self.options.predict else logits
