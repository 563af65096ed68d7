"""The layer that makes structures of the features of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InputSelection(nn.Module):
    """Passes on features of its input: all of them, until a reduction removes some.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(bmrs.InputSelection(4), bmrs.MultiplicativeNoise(4), nn.Linear(4, 2))
    >>> bmrs.structures(bmrs.without_noise(net), torch.zeros(2, 4)).table.kind[0]
    'inputs'
    >>> net(torch.zeros(5, 4)).shape
    torch.Size([5, 2])

    With a noise layer behind it every feature is a structure. On the network's input this is automatic relevance
    determination (MacKay, 1994): a feature is removed with the columns that read it. The reduced network takes
    the same inputs as before and ignores the removed ones. Behind layers, for example on the flattened positions
    of filters, it makes structures inside structures: a position can be removed alone, with the column that reads
    it, and is removed with its filter. The layer has no parameters.

    Attributes:
        index: numbers of the features that are passed on. Shape: (features,).
        features: number of features that are passed on.
        width: number of features of the input. It shrinks when structures that make them are removed.

    Args:
        features: number of features, the size of dimension `dim` of the input.
        dim: dimension of the input that counts features, as in `MultiplicativeNoise`.

    Raises:
        ValueError: if features < 1, dim is 0 (the examples), or the input has another number of features.
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
        """The positions of an input feature in the output; empty if it is not passed on."""
        if self.index.is_meta:  # values can't be read, but their first ones are known
            if self.features != self.width:
                raise ValueError("a selection on the meta device must have lost nothing to be followed")
            return [feature]
        return torch.nonzero(self.index == feature).flatten().tolist()

    def renumber(self, kept: list[int]) -> None:
        """Pass on the same features after the input has lost all features but `kept` (in increasing order)."""
        self.index = torch.searchsorted(torch.tensor(kept, device=self.index.device), self.index)
        self.width = len(kept)

    def extra_repr(self) -> str:
        return f"{self.features} of {self.width}, dim={self.dim}"
