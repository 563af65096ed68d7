"""Networks in which channels are split, moved, shuffled or scaled on their way, one mechanism each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from family import OUTPUT, Family, images
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from pyro_bmrs.networks.inputs import Inputs


class SwiGLU(nn.Module):
    """Gate and values in one projection."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(inputs, 2 * hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def gated_units() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Linear(12, 40), nn.GLU(), SwiGLU(20, 16, 10), nn.Tanh(), nn.Linear(10, 4)
    ), images(12)  # fmt: skip


class Block(nn.Sequential):
    """A convolution that keeps the size, BatchNorm and SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class Pooled(nn.Module):
    """A part of a network between a first convolution and a classifier of what is pooled."""

    def __init__(self, first: nn.Module, part: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.part, self.head = first, part, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.first(x)).mean((2, 3)))


class Split(nn.Module):
    """As C2f in YOLO: one part goes on as it is, the other through a residual branch as well."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (8, 6)
        self.first, self.last = Block(3, 14), Block(8 + 6 + 6, 10)
        self.narrow, self.wide = Block(6, 5, 3), Block(5, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).split(self.sizes, dim=1)
        return self.last(torch.cat([left, right, right + self.wide(self.narrow(right))], dim=1))


def split_channels() -> tuple[nn.Module, Inputs]:
    return Pooled(nn.Identity(), Split(), 10), images(3, 8, 8)


class Halves(nn.Module):
    """As CSP: two halves that are used differently. Nothing says how large they are: they must be equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = Block(3, 16), Block(8, 6, 3), Block(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, dim=1)
        return self.last(torch.cat([left, self.inner(right)], dim=1))


def equal_halves() -> tuple[nn.Module, Inputs]:
    return Pooled(nn.Identity(), Halves(), 10), images(3, 8, 8)


class Scales(nn.Module):
    """As Res2Net: parts of one width, each but the last is added to what a convolution makes of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.first, self.last = Block(3, 16), Block(16, 9)
        self.convs = nn.ModuleList(Block(4, 4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).split(self.width, dim=1)
        made = [self.convs[0](parts[0])]
        for conv, part in zip(self.convs[1:], parts[1:], strict=False):
            made.append(conv(made[-1] + part))
        return self.last(torch.cat([*made, parts[3]], dim=1))


def res2net() -> tuple[nn.Module, Inputs]:
    return Pooled(nn.Identity(), Scales(), 9), images(3, 8, 8)


class Unbound(nn.Module):
    """Three projections in one, taken apart by unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.head = nn.Linear(12, 30), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        forget, gate, value = self.three(x).view(len(x), 3, -1).unbind(dim=1)
        return self.head(torch.sigmoid(forget) + torch.sigmoid(gate) * value)


def unbound() -> tuple[nn.Module, Inputs]:
    return Unbound(), images(12)


class ShuffleUnit(nn.Module):
    """As in ShuffleNetV2: one half goes through a branch, then the channels of both are shuffled."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden), nn.Conv2d(hidden, half, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        both = torch.cat([left, self.branch(right)], dim=1)
        batch, channels, height, width = both.shape
        return both.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(both.shape)


def channel_shuffle() -> tuple[nn.Module, Inputs]:
    return Pooled(Block(3, 16, 3), ShuffleUnit(16, 10), 16), images(3, 8, 8)


def shufflenet() -> tuple[nn.Module, Inputs]:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 48], num_classes=10), images(3, 32, 32)


def pixel_shuffle() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Conv2d(3, 10, 1), nn.ReLU(), nn.Conv2d(10, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3),
        nn.PixelShuffle(2), nn.Conv2d(4, 2, 1),
    ), images(3, 8, 8)  # fmt: skip


class Focus(nn.Module):
    """The four pixels of a square become channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)


def space_to_depth() -> tuple[nn.Module, Inputs]:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(24, 8, 1), nn.ReLU(),
        Focus(), nn.Conv2d(32, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3),
    ), images(3, 8, 8)  # fmt: skip


class ChannelsLast(nn.Module):
    """A convolution whose output is flattened pixel by pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.hidden, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8 * 16, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.relu(self.filters(x)).permute(0, 2, 3, 1)
        return self.head(torch.relu(self.hidden(pixels.flatten(1))))


def channels_last() -> tuple[nn.Module, Inputs]:
    return ChannelsLast(), images(3, 4, 4)


class Scaled(nn.Module):
    """A residual branch with a scale per channel, as in ConvNeXt and CaiT."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.wide, self.narrow = Block(8, 6, 3), nn.Conv2d(6, 8, 1)
        self.gamma = nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma if self.gamma.dim() == 3 else self.gamma.view(1, -1, 1, 1)
        return x + gamma * self.narrow(self.wide(x))


def layer_scale() -> tuple[nn.Module, Inputs]:
    return Pooled(Block(3, 8, 3), nn.Sequential(Scaled(8), Scaled(8, 1, 1)), 8), images(3, 8, 8)


class GRN(nn.Module):
    """Global response normalisation of ConvNeXt-V2. With its first weights, 0, it does nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta


class ConvNeXtV2(nn.Module):
    """Linear layers on channels-last images, GRN between them."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.grn, self.narrow = nn.Linear(8, 12), GRN(12), nn.Linear(12, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.filters(x))).permute(0, 2, 3, 1)
        return self.head(F.gelu(self.narrow(self.grn(F.gelu(self.wide(x))))).mean((1, 2)))


def global_response() -> tuple[nn.Module, Inputs]:
    return ConvNeXtV2(), images(3, 6, 6)


class Gate(nn.Module):
    """A map of one channel, which all channels are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.last = nn.Conv2d(8, 1, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.last(x * torch.sigmoid(self.gate(x))))


def gate_of_one_channel() -> tuple[nn.Module, Inputs]:
    return Pooled(Block(3, 8, 3), Gate(), 6), images(3, 8, 8)


class Frozen(nn.Module):
    """A normalisation with statistics that never change, (1, channels, 1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(1, channels, 1, 1))
        self.register_buffer("deviation", 0.5 + torch.rand(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.deviation


class ScaleShift(nn.Module):
    """A scale and a shift per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


def own_parameters() -> tuple[nn.Module, Inputs]:
    frozen = FrozenBatchNorm2d(8)
    for name, buffer in frozen.named_buffers():
        setattr(frozen, name, 0.5 + torch.rand(buffer.shape))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), frozen, nn.ReLU(), nn.Conv2d(8, 6, 3), Frozen(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10), ScaleShift(10), nn.Tanh(), nn.Linear(10, 4),
    ), images(3, 8, 8)  # fmt: skip


def group_norm() -> tuple[nn.Module, Inputs]:
    part = nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU())
    return Pooled(nn.Conv2d(3, 16, 3), part, 8), images(3, 8, 8)


def depth_multiplier() -> tuple[nn.Module, Inputs]:
    part = nn.Sequential(
        nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU()
    )
    return Pooled(Block(3, 6, 3), part, 8), images(3, 8, 8)


class Matrix(nn.Module):
    """A linear map that is not `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def behind_a_layer(*layers: nn.Module) -> tuple[nn.Module, Inputs]:
    """Between a hidden layer that can be cut, of 8 units, and a classifier of 6 inputs."""
    return nn.Sequential(
        nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), *layers, nn.Linear(6, 2)
    ), images(4)  # fmt: skip


def own_matrix() -> tuple[nn.Module, Inputs]:
    return behind_a_layer(Matrix(), nn.ReLU())


def softmax_over_channels() -> tuple[nn.Module, Inputs]:
    return behind_a_layer(nn.Linear(8, 6), nn.Softmax(dim=1))


CHANNELS = [
    Family(
        "Gated linear units in one projection", "`nn.GLU`, and SwiGLU by `chunk`: two rows a structure", gated_units,
        3, {"units": 20 + 16 + 10}, {"4": OUTPUT},
    ),
    Family(
        "C2f as in YOLO (own)", "channels that `split` takes apart, of sizes that the module stores", split_channels,
        # the first: 8 that go on, 6 that a residual branch is added to
        4, {"filters": 14 + 5 + 10}, {"head": OUTPUT},
    ),
    Family(
        "CSP by `chunk` (own)", "halves that must stay equal: one channel of each is a structure", equal_halves,
        3, {"filters": 8 + 6 + 10}, {"head": OUTPUT},
    ),
    Family(
        "Res2Net (own)", "parts of one width: a channel of each is a structure", res2net,
        # of the first convolution, with those added to its parts; of the last of the three; behind them
        3, {"filters": 4 + 4 + 9}, {"head": OUTPUT},
    ),
    Family(
        "Three projections in one, by `unbind`", "three rows a structure", unbound,
        1, {"units": 10}, {"head": OUTPUT},
    ),
    Family(
        "A shuffle of channels (own, one unit)", "two halves, joined and shuffled", channel_shuffle,
        # chunk ties i of the first 16 to i + 8; the shuffle ties i of the first half to i of the branch
        2, {"filters": 8 + 10}, {"head": OUTPUT},
    ),
    Family(
        "ShuffleNetV2 (torchvision, small)", "halves and shuffles, one behind the other", shufflenet,
        # first convolution 8; per stage of width 2h: h in the middle of the second branch of the first unit, h/2 for
        # what the chunk of the second unit ties in fours, h in the middle of its branch; last convolution 48
        11, {"filters": 8 + 48 + (8 + 4 + 8) + (16 + 8 + 16) + (32 + 16 + 32)}, {"fc": OUTPUT},
    ),
    Family(
        "`nn.PixelShuffle`", "four filters become one channel of more pixels", pixel_shuffle,
        3, {"filters": 10 + 8 + 4}, {"6": OUTPUT},
    ),
    Family(
        "Space to depth", "pixels become channels: `nn.PixelUnshuffle`, and a concatenation of slices",
        space_to_depth, 3, {"filters": 6 + 8 + 10}, {"10": OUTPUT},
    ),
    Family(
        "Flatten with channels last", "pixels in front of channels: the columns of a filter lie apart", channels_last,
        2, {"filters": 8, "units": 6}, {"head": OUTPUT},
    ),
    Family(
        "Layer scale (own)", "a scale per channel at the end of each residual branch", layer_scale,
        3, {"filters": 8 + 6 + 6}, {"head": OUTPUT},
    ),
    Family(
        "Global response normalisation as in ConvNeXt-V2 (own)", "hidden units that are normalised by each other",
        global_response, 2, {"filters": 8, "units": 10}, {"wide": "", "head": OUTPUT},
    ),
    Family(
        "A gate of one channel", "a map that all channels are multiplied by, tied to none", gate_of_one_channel,
        2, {"filters": 8 + 6}, {"part.gate": "", "head": OUTPUT},
    ),
    Family(
        "Own modules with a parameter per channel", "scale and shift, frozen statistics in buffers", own_parameters,
        3, {"filters": 8 + 6, "units": 10}, {"11": OUTPUT},
    ),
    Family(
        "GroupNorm", "whole groups of channels, each normalised together, are structures", group_norm,
        2, {"filters": 4 + 8}, {"head": OUTPUT},
    ),
    Family(
        "Depthwise convolution with two filters a channel", "both leave with the channel that they read",
        depth_multiplier, 2, {"filters": 6 + 8}, {"head": OUTPUT},
    ),
    Family(
        "A module that multiplies by its own parameter", "a matrix that is no `nn.Linear`", own_matrix,
        3, {"units": 10 + 8 + 6}, {"6": OUTPUT},
    ),
    Family(
        "Softmax over channels", "each channel depends on all the others", softmax_over_channels,
        2, {"units": 10 + 8}, {"4": "softmax", "6": OUTPUT},
    ),
]  # fmt: skip
