"""The layer that says which features of what it is given are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InputSelection(nn.Module):
    """Passes on the selected features of its input: all of them, until a reduction takes some away.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(bmrs.InputSelection(4), bmrs.MultiplicativeNoise(4), nn.Linear(4, 2))
    >>> bmrs.structures(bmrs.without_noise(net), torch.zeros(2, 4)).table.kind[0]
    'inputs'
    >>> net(torch.zeros(5, 4)).shape
    torch.Size([5, 2])

    A noise layer behind it makes a structure of every feature. Of the network's input this is automatic relevance
    determination (MacKay, 1994): with a feature leave the columns that read it, and a reduced network takes
    the same inputs as before and ignores those that are gone. Of what layers make, such as the flattened positions
    of filters, it makes structures inside structures: a position can leave alone, with the column that reads it,
    and leaves with its filter. The layer has no parameters.

    Attributes:
        index: which features are read, in the numbers of the input. Shape: (features,).
        features: how many.
        width: how many features the input has: fewer where structures that make them have left.

    Args:
        features: number of features, the size of dimension `dim` of the input.
        dim: dimension of the input that counts features, as in `MultiplicativeNoise`.

    Raises:
        ValueError: if features < 1, dim counts examples, or the input has another number of features.
    """

    index: Tensor

    def __init__(self, features: int, *, dim: int = 1) -> None:
        super().__init__()
        if not isinstance(features, int) or isinstance(features, bool) or features < 1:
            raise ValueError(f"features must be a positive integer: got {features!r}")
        if not isinstance(dim, int) or isinstance(dim, bool) or dim == 0:
            raise ValueError(f"dim must be an integer other than 0, which counts examples: got {dim!r}")
        self.features, self.dim, self.width = features, dim, features
        self.register_buffer("index", torch.arange(features))

    def forward(self, x: Tensor) -> Tensor:
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.width:
            raise ValueError(
                f"input must have {self.width} features in dimension {self.dim}: got shape {tuple(x.shape)}"
            )
        return x.index_select(self.dim, self.index)

    def rows_of(self, feature: int) -> list[int]:
        """Where a feature of the input is in the output: nowhere, if it is not selected."""
        if self.index.is_meta:  # numbers that can't be looked at, but for what they are at first
            if self.features != self.width:
                raise ValueError("a selection on the meta device must have lost nothing to be followed")
            return [feature]
        return torch.nonzero(self.index == feature).flatten().tolist()

    def renumber(self, kept: list[int]) -> None:
        """Select the same of an input that has lost all features but `kept`, in increasing order."""
        self.index = torch.searchsorted(torch.tensor(kept, device=self.index.device), self.index)

    def extra_repr(self) -> str:
        return f"{self.features} of {self.width}, dim={self.dim}"
