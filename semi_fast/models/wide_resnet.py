"""Wide residual networks for small images, as the FixMatch lineage builds them; registered with timm."""

from __future__ import annotations

from typing import Any

import timm.models
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

SLOPE = 0.1


class Unit(nn.Module):
    """A pre-activation residual unit: two 3x3 convolutions and, where the width changes, a 1x1 shortcut.

    `entry` says what the unit does with its first normalisation:
    `"branch"`: it feeds the convolutions, the shortcut takes the raw input (units that keep the width);
    `"both"`: it feeds convolutions and shortcut (the first unit, and without quirk all that change the width);
    `"unused"`: convolutions and shortcut take the raw input (the quirk, see `WideResNet`).
    """

    def __init__(self, width_in: int, width: int, stride: int, entry: str):
        super().__init__()
        self.entry = entry
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = x if self.entry == "unused" else self.act(self.bn1(x))
        branch = self.conv2(self.act(self.bn2(self.conv1(activated))))
        return branch + self.shortcut(x if self.entry == "branch" else activated)


class WideResNet(nn.Module):
    """WRN-depth-width: 3 groups of (depth - 4) / 6 units, widths 16, 32, 64 times `width`, global average pooling.

    `quirk` keeps a peculiarity of the published code, which all baselines of this lineage share: the first unit of
    groups 2 and 3 has a first normalisation that nothing uses (its parameters get no gradient).
    Initialisation: convolutions Kaiming-normal over fan-out, linear Xavier-normal, bias 0.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        quirk: bool = True,
        **timm_only: Any,
    ):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4; got {depth}")
        self.num_classes, self.num_features = num_classes, 64 * width
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        units, width_in = [], 16
        for group in range(3):
            for unit in range((depth - 4) // 6):
                width_out, first = 16 * 2**group * width, unit == 0
                changes = "unused" if quirk and group > 0 else "both"
                entry = changes if first and (group > 0 or width_in != width_out) else "branch"
                units.append(Unit(width_in, width_out, 2 if first and group > 0 else 1, entry))
                width_in = width_out
        self.units = nn.Sequential(*units)
        self.bn = nn.BatchNorm2d(self.num_features)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.fc = self.make_head()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def make_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes)
        nn.init.xavier_normal_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, *_: Any, **__: Any) -> None:
        self.num_classes = num_classes
        self.fc = self.make_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, D, H / 4, W / 4]."""
        return self.act(self.bn(self.units(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, num_classes], or the pooled features [n, D] where num_classes is 0.

        The pooling is in float32 also under autocast: features feed thresholds, distances and a bank.
        """
        maps = self.forward_features(x)
        return self.fc((maps if maps.dtype == torch.float64 else maps.float()).mean((2, 3)))


SHAPES = ((10, 1), (10, 2), (16, 2), (28, 2), (28, 8))  # depth, width
default_cfgs = generate_default_cfgs(  # timm looks for this name beside an entry point
    {
        f"wrn_{depth}_{width}": {"url": "", "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}
        for depth, width in SHAPES
    }
)


def register(depth: int, width: int) -> None:
    """Give timm the entry point `wrn_<depth>_<width>`."""
    name = f"wrn_{depth}_{width}"

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(WideResNet, name, pretrained, depth=depth, width=width, **kwargs)

    entry.__name__, entry.__module__ = name, __name__
    globals()[name] = timm.models.register_model(entry)


for shape in SHAPES:
    register(*shape)
