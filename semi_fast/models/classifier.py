"""A timm backbone with one linear classifier per head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import timm
import torch
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
        """images: float [N, 3, H, W]. Features and logits are float32 (float64 in a float64 run), autocast or not."""
        features = self.backbone(images)
        features = features if features.dtype == torch.float64 else features.float()
        with torch.autocast(features.device.type, enabled=False):
            return Outputs(features, self.classify(features), self.classify)

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        """Logits [n, C] of every head, from features [n, D]."""
        return {name: head(features) for name, head in self.heads.items()}


def make_classifier(
    options: ModelConfig, classes: int, heads: Sequence[str], resolution: tuple[int, int]
) -> Classifier:
    """The network of a run, with torch's global generator as the source of its initial weights.

    Raises ValueError for a name that timm does not know, and for a model that makes no vector of features from
    images of `resolution` (height, width).
    """
    if not timm.is_model(options.name):
        near = timm.list_models(f"*{options.name.split('_')[0]}*")[:5]
        names = ", ".join(near) or "none"
        raise ValueError(f"model.name must be one of timm's or ours; got {options.name}; near: {names}")
    backbone = make_backbone(options, resolution)
    features = feature_width(backbone, options.name, resolution)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.num_batches_tracked = None  # counted for a momentum of None alone: one launch a layer saved
            if options.bn_momentum is not None:
                module.momentum = options.bn_momentum
    return Classifier(backbone, features, classes, heads)


def make_backbone(options: ModelConfig, resolution: tuple[int, int]) -> nn.Module:
    """The timm model without its classifier; models that must know the image size are told it."""
    if options.name.startswith("wrn_"):
        return timm.create_model(options.name, num_classes=0, quirk=options.wrn_quirk)
    try:
        return timm.create_model(options.name, num_classes=0, img_size=resolution)
    except TypeError:
        return timm.create_model(options.name, num_classes=0)


def feature_width(backbone: nn.Module, name: str, resolution: tuple[int, int]) -> int:
    """D, found by showing the backbone one image."""
    image = torch.zeros(1, 3, *resolution, device=next(backbone.parameters()).device)
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(image)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"model.name {name} does not take images of {resolution[0]}x{resolution[1]} ({error}); "
            "use another model, or prepare the data at another --resolution"
        ) from error
    backbone.train()
    if features.ndim != 2:
        raise ValueError(f"model.name must give a vector per image; {name} gives {tuple(features.shape)}")
    return features.shape[1]
