"""The residual networks of the field for CIFAR (He et al. 2016, section 4.2), with the keys of its checkpoints."""

import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cadis_ray.errors import UsageError

SIZE = 32
WIDTHS = (16, 32, 64)
# Of CIFAR-10, as the programs of Cohen et al. 2019 and its successors round them.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, a 1x1 convolution where the shape changes: (B, C, H, W)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Three stages of n blocks, 16, 32 and 64 channels wide, 6 n + 2 layers deep: (B, C, 32, 32) -> logits (B, K)."""

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        channels = WIDTHS[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for stage, width in enumerate(WIDTHS):
            blocks = []
            for place in range((depth - 2) // 6):
                blocks.append(Block(channels, width, stride=2 if stage and not place else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(images)))
        return self.fc(self.layer3(self.layer2(self.layer1(h))).mean((2, 3)))


def make_resnet(name: str, config: dict[str, Any]) -> ResNet:
    """``resnetD`` with D = 6 n + 2 layers and random weights; ``config``: ``num_classes``, ``in_chans``.

    Raises UsageError for another name or argument.
    """
    depth = int(digits[1]) if (digits := re.fullmatch(r"resnet([0-9]{1,4})", name)) else 0
    if depth < 8 or depth % 6 != 2:
        raise UsageError(
            f"classifier.name: got {name!r}; the library resnet has resnet20, resnet32, ... resnet110: 6 n + 2 layers"
        )
    wrong = [key for key, value in config.items()
             if key not in ("num_classes", "in_chans") or type(value) is not int or value < 1]  # fmt: skip
    if wrong:
        raise UsageError(
            f"classifier.config: resnet does not take {', '.join(f'{key}: {config[key]!r}' for key in wrong)}; "
            "it takes num_classes and in_chans, whole numbers >= 1"
        )
    return ResNet(depth, **config)
