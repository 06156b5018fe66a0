"""ResNet-50 for small images: timm's, with the stem that CIFAR networks have; registered with timm."""

from __future__ import annotations

from typing import Any

import timm.models
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

default_cfgs = generate_default_cfgs(  # timm looks for this name beside an entry point
    {"resnet50_cifar": {"url": "", "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}}
)


def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """[3, 4, 6, 3] bottlenecks after a 3x3 convolution of stride 1 and no max-pool; D = 2048, H / 8 before pooling.

    The stem is that of SeMi's released code for ImageNet-127; the paper says ResNet-50. As in torchvision, and unlike
    timm's own ResNet-50, the last normalisation of a branch starts at 1 (inferred: neither source says).
    """
    options = {"block": Bottleneck, "layers": (3, 4, 6, 3), "zero_init_last": False} | kwargs
    model = build_model_with_cfg(ResNet, "resnet50_cifar", pretrained, **options)
    assert isinstance(model, ResNet)
    stem = nn.Conv2d(kwargs.get("in_chans", 3), 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()
    return model


timm.models.register_model(resnet50_cifar)
