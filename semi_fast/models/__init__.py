"""Networks: ours are registered with timm, and any timm model becomes a `Classifier`."""

from semi_fast.models.classifier import Classifier, make_classifier
from semi_fast.models.resnet import resnet50_cifar
from semi_fast.models.wide_resnet import WideResNet

__all__ = ["Classifier", "WideResNet", "make_classifier", "resnet50_cifar"]
