"""torchvision's vision transformer, with one latent θ per attention head and hidden unit.

`plain` makes the network without noise, to train first or to load weights into. `network` adds the noise.
The channels between the blocks feed a LayerNorm, so they stay.
"""

import torch
from torch import nn
from torchvision.models import VisionTransformer

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
        "learning_rate": 5e-4,
        "posterior_learning_rate": 1e-2,
        "fine_tune": 8,
    },
}


def plain(
    input_shape: tuple[int, ...],
    num_classes: int,
    patch: int = 4,
    layers: int = 4,
    heads: int = 4,
    width: int = 96,
    hidden: int = 192,
) -> VisionTransformer:
    """A vision transformer without noise for square images. A token is a square of `patch` pixels a side."""
    if len(input_shape) != 3 or input_shape[1] != input_shape[2] or input_shape[1] % patch:
        raise ValueError(
            f"a vision transformer takes square images of a multiple of {patch} pixels: got input shape {input_shape}"
        )
    channels, side, _ = input_shape
    net = VisionTransformer(side, patch, layers, heads, width, hidden, num_classes=num_classes)
    if channels != 3:
        net.conv_proj = nn.Conv2d(channels, width, patch, patch)
    # torchvision starts the head at zero; then no gradient reaches the layers before it
    nn.init.normal_(net.heads.head.weight, std=0.02)
    return net


def network(input_shape: tuple[int, ...], num_classes: int, **sizes: int) -> nn.Module:
    """The same network with noise on every head and every hidden unit of the feed-forward layers."""
    return bmrs.insert_noise(plain(input_shape, num_classes, **sizes), torch.zeros(2, *input_shape))
