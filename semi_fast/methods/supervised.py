"""Supervised training on the labeled images alone: the lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from torch import Tensor
from torch.nn.functional import cross_entropy

from semi_fast.batch import Outputs, Rows, split_rows
from semi_fast.methods.base import Environment, Loss, Needs, State
from semi_fast.methods.plugins.base import Plugin


class Supervised:
    """Cross-entropy of the weak view of labeled images."""

    needs = Needs()

    def __init__(self, plugins: Sequence[Plugin] = ()):
        self.plugins = tuple(plugins)
        self.predicts = "adjusted_head" if any(plugin.adjusts_prediction for plugin in plugins) else "head"

    def init(self, env: Environment) -> State:
        return {name: tensor for plugin in self.plugins for name, tensor in plugin.init(env).items()}

    def labeled_loss(self, state: State, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of [B, C] logits after the plug-ins."""
        return cross_entropy(reduce(lambda z, plugin: plugin.label_logits(state, z), self.plugins, logits), labels)

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        supervised = self.labeled_loss(state, split_rows(outputs.logits["head"], rows.layout).labeled, rows.labels)
        return Loss(supervised, {"supervised": supervised}, {}, {})

    def update(self, state: State, pending: State, step: Tensor) -> None:
        """Nothing is carried from step to step."""

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        return reduce(lambda z, plugin: plugin.logits(state, z), self.plugins, outputs.logits["head"])
