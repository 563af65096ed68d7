"""Residual networks: torchvision's ResNet-18 and ResNet-50, and the small ones for 32×32 images.

`plain` makes the network without noise, to train first or to load weights into. `network` puts one latent
θ on every channel that can be removed, including those of the residual streams.
"""

import torch
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock

import pyro_bmrs as bmrs

# For a fit from random weights. For a trained network see analysis/pretrained.py.
SETTINGS = {
    "default": {
        "image_size": 32,
        "epochs": 40,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 10,
    },
    "cifar10": {
        "image_size": 32,
        "epochs": 12,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 8,
    },
}


class SmallResNet(nn.Module):
    """Three stages of `blocks` basic blocks, 16, 32 and 64 channels wide: He et al. (2016), section 4.2.

    Where the shape changes the shortcut has a convolution, as in torchvision's networks.
    """

    def __init__(self, channels: int, num_classes: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1:
            shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        first = BasicBlock(width_in, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))

    def forward(self, x):
        # CPUs convolve faster in this memory format, by a third here
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def plain(input_shape: tuple[int, ...], num_classes: int, depth: int = 20) -> nn.Module:
    """A ResNet without noise: torchvision's for depth 18 or 50, the small one for depth 6n + 2.

    For images of at most 64 pixels torchvision's first convolution becomes 3×3 with stride 1, and its
    pooling is dropped: 7×7 at stride 2 with pooling would leave little of a small image.
    """
    if len(input_shape) != 3:
        raise ValueError(f"a ResNet takes images (channels, height, width): got input shape {input_shape}")
    channels, *sides = input_shape
    if depth not in (18, 50):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 18, 50, or 6n + 2 (8, 14, 20, …): got {depth}")
        return SmallResNet(channels, num_classes, (depth - 2) // 6)
    net = {18: resnet18, 50: resnet50}[depth](num_classes=num_classes)
    small = max(sides) <= 64
    if small or channels != 3:
        size, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        net.conv1 = nn.Conv2d(channels, 64, size, stride, padding, bias=False)
    if small:
        net.maxpool = nn.Identity()
    return net


def network(input_shape: tuple[int, ...], num_classes: int, depth: int = 20) -> nn.Module:
    """The same network with noise on every removable channel."""
    return bmrs.insert_noise(plain(input_shape, num_classes, depth), torch.zeros(2, *input_shape))
