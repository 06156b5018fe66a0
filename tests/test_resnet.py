"""ResNet-50 with the stem of CIFAR networks: shapes, parameters and what is as in timm's own."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from semi_fast.models import make_classifier
from semi_fast.schema.model import ModelConfig

TORCHVISION_WITHOUT_CLASSIFIER = 25_557_032 - (2048 * 1000 + 1000)
STEM, CIFAR_STEM = 64 * 3 * 7 * 7, 64 * 3 * 3 * 3


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("resnet50_cifar", num_classes=0)


def test_the_number_of_parameters_is_that_worked_out_by_hand(model: nn.Module) -> None:
    expected = TORCHVISION_WITHOUT_CLASSIFIER - STEM + CIFAR_STEM
    assert expected == 23_508_032 - 9_408 + 1_728 == 23_500_352
    assert sum(p.numel() for p in model.parameters()) == expected
    with_classifier = timm.create_model("resnet50_cifar", num_classes=127)
    assert sum(p.numel() for p in with_classifier.parameters()) == expected + 2048 * 127 + 127


@pytest.mark.parametrize("side", [32, 64])
def test_features_keep_an_eighth_of_the_side_and_are_pooled_to_2048(model: nn.Module, side: int) -> None:
    images = torch.zeros(2, 3, side, side)
    with torch.no_grad():
        assert model.forward_features(images).shape == (2, 2048, side // 8, side // 8)  # type: ignore[operator]
        assert model(images).shape == (2, 2048)


def test_only_the_stem_differs_from_the_original(model: nn.Module) -> None:
    original = timm.create_model("resnet50", num_classes=0)
    ours, theirs = ({name: p.shape for name, p in m.named_parameters()} for m in (model, original))
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == {"conv1.weight"}
    assert (model.conv1.stride, model.conv1.padding) == ((1, 1), (1, 1))  # type: ignore[union-attr]
    assert all(m.weight.min() == 1 for m in model.modules() if isinstance(m, nn.BatchNorm2d)), "all start at 1"


def test_it_is_a_backbone_of_two_heads() -> None:
    options = ModelConfig(name="resnet50_cifar", bn_momentum=0.1)
    classifier = make_classifier(options, 127, ("head", "balanced_head"), (32, 32))
    assert classifier.features == 2048
    with torch.no_grad():
        outputs = classifier(torch.zeros(2, 3, 32, 32))
    assert {name: logits.shape for name, logits in outputs.logits.items()} == {
        "head": (2, 127),
        "balanced_head": (2, 127),
    }
    assert {m.momentum for m in classifier.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
