"""A timm backbone with one linear classifier per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import timm
from torch import Tensor, nn

from semi_fast.batch import Outputs
from semi_fast.schema.model import ModelConfig


class Classifier(nn.Module):
    """Pooled features [N, D] and, from them, the logits [N, C] of every head."""

    def __init__(self, backbone: nn.Module, features: int, classes: int, heads: Sequence[str]):
        super().__init__()
        self.backbone, self.features = backbone, features
        self.heads = nn.ModuleDict({name: nn.Linear(features, classes) for name in heads})
        for head in self.heads.values():
            linear = cast(nn.Linear, head)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Outputs:
        """images: float [N, 3, H, W]."""
        features = self.backbone(images)
        return Outputs(features, {name: head(features) for name, head in self.heads.items()})


def make_classifier(options: ModelConfig, classes: int, heads: Sequence[str]) -> Classifier:
    """The network of a run, with torch's global generator as the source of its initial weights.

    Raises ValueError for a name that timm does not know and for one whose output is not a vector of features.
    """
    if not timm.is_model(options.name):
        near = timm.list_models(f"*{options.name.split('_')[0]}*")[:5]
        names = ", ".join(near) or "none"
        raise ValueError(f"model.name must be one of timm's or ours; got {options.name}; near: {names}")
    own: dict[str, Any] = {"quirk": options.wrn_quirk} if options.name.startswith("wrn_") else {}
    backbone = timm.create_model(options.name, pretrained=False, num_classes=0, **own)
    features = getattr(backbone, "num_features", None)
    if not isinstance(features, int):
        raise ValueError(f"model.name must give pooled features; {options.name} does not say how many")
    features = int(getattr(backbone, "head_hidden_size", features) or features)
    if options.bn_momentum is not None:
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = options.bn_momentum
    return Classifier(backbone, features, classes, heads)
