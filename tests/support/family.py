"""What a kind of network is: a small example of it, and what is found in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.inputs import Inputs

EXAMPLES = 32
OUTPUT = "an output of the network"
NORMALISED = "normalised together"


@dataclass(frozen=True)
class Family:
    """A network that is handled.

    Attributes:
        name: of the example.
        stands_for: what is special about it, in a few words.
        build: makes it, with an example input.
        groups: number of groups that are found.
        structures: number of structures by kind.
        stays: reason why channels stay, by path or pattern of the first module that makes them.
    """

    name: str
    stands_for: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    groups: int
    structures: Mapping[str, int]
    stays: Mapping[str, str]


@dataclass(frozen=True)
class Unsupported:
    """A network of which a part can't be followed, cut or tried. It stays; with `strict=True` it is an error.

    Attributes:
        name: of the example.
        build: makes it, with an example input.
        path: pattern of the first module that makes what stays.
        reason: part of the reason.
        why: the reason at length, and what to do.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    path: str
    reason: str
    why: str


def images(*shape: int) -> Tensor:
    """Noise that differs between examples as a whole too, so that what is pooled over positions still varies."""
    return torch.randn(EXAMPLES, *shape) + 2 * torch.randn(EXAMPLES, shape[0], *[1] * (len(shape) - 1))


def tokens() -> Tensor:
    return torch.randint(50, (EXAMPLES, 7))
