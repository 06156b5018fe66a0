"""FixMatch: confident predictions on the weak view are the targets of the strong views."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from semi_fast.batch import Outputs, Rows, split_rows
from semi_fast.methods.base import Environment, Loss, Needs, State, fraction
from semi_fast.methods.plugins.base import Plugin
from semi_fast.methods.supervised import Supervised
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.schema.method import FixMatchConfig


class FixMatch:
    """Sohn et al. 2020; the unlabeled term is a mean over all S * U strong rows, masked or not."""

    def __init__(self, options: FixMatchConfig, plugins: Sequence[Plugin] = ()):
        self.options = options
        self.needs = Needs(strong_views=options.strong_views, unlabeled=True)
        self.supervised = Supervised(plugins)
        self.predicts = self.supervised.predicts

    def init(self, env: Environment) -> State:
        return self.supervised.init(env)

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        labeled, weak, strong = split_rows(outputs.logits["head"], rows.layout)
        adjusted = reduce(lambda z, plugin: plugin.adjust(state, z), self.supervised.plugins, weak.detach())
        confidence, label = torch.softmax(adjusted, 1).max(1)  # [U]
        mask = confidence >= self.options.threshold
        terms = {
            "supervised": self.supervised.labeled_loss(state, labeled, rows.labels),
            "unlabeled": self.options.unlabeled_weight * masked_cross_entropy(strong, label, mask.to(strong.dtype)),
        }
        pending = {"pseudo_label": label, "mask": mask}
        return Loss(terms["supervised"] + terms["unlabeled"], terms, pending, {"mask": fraction(mask)})

    def update(self, state: State, pending: State, step: Tensor) -> None:
        """Nothing is carried from step to step."""

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        return self.supervised.logits(state, outputs)
