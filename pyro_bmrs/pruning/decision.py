"""Which structures are removed, given scores: by threshold, floor, rounding and nesting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmrs.networks.nesting import Nesting


@dataclass(frozen=True)
class Candidates:
    """The structures of a layer and what is wanted for them. Shapes: (features,).

    Attributes:
        removed: True for structures that are to be removed.
        score: where a floor keeps some of them, those with the lowest scores stay.
        kept: False for structures that were removed before. They can't come back.
        least: the floor: structures that stay at least.
        multiple: the number of structures that stay is a multiple of this, or all stay.
        unread: structures that no layer reads any more. They are removed; if the floor forces some to stay, these
            are kept last. None: there are none.
    """

    removed: Tensor
    score: Tensor
    kept: Tensor
    least: int = 1
    multiple: int = 1
    unread: Tensor | None = None

    def decided(self) -> Tensor:
        """What is removed of the layer, floor and rounding included. Shape: (features,)."""
        unread = torch.zeros_like(self.removed) if self.unread is None else self.unread
        leaves = self.removed | unread | ~self.kept
        wanted = max(int((~leaves).sum()), self.least)
        wanted = min(-(-wanted // self.multiple) * self.multiple, int(self.kept.sum()))
        order = self.score.argsort(stable=True)
        for later in (leaves, unread, ~self.kept):
            order = order[later[order].int().argsort(stable=True)]
        return leaves.index_fill(0, order[:wanted], False)


def removals(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What is removed of each layer: candidates, structures inside them, and structures that no layer reads then.

    >>> filters = Candidates(torch.tensor([True, False]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> positions = Candidates(torch.tensor([False, False, True]), torch.tensor([-2.0, -1.0, 0.5]),
    ...                        torch.tensor([True, True, True]))
    >>> inside = Nesting({"positions": {"filters": torch.tensor([0, 1, 1])}}, {"filters": torch.tensor([True, True])})
    >>> removals({"filters": filters, "positions": positions}, inside)
    {'filters': tensor([ True, False]), 'positions': tensor([ True, False,  True])}

    Shapes: (features,) of each layer.
    """
    unread = {site: torch.zeros_like(layer.removed) for site, layer in layers.items()}
    while True:
        asked = {site: replace(layer, unread=unread[site]) for site, layer in layers.items()}
        removed = _with_what_lies_inside(asked, nesting)
        found = {site: unread[site] | (nesting.unread(site, removed) & ~removed[site]) for site in layers}
        if all(torch.equal(found[site], unread[site]) for site in layers):
            return removed
        unread = found


def _with_what_lies_inside(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What is removed of each layer, and what lies inside of it."""
    found: dict[str, Tensor] = {}

    def decide(site: str) -> Tensor:
        if site not in found:
            layer = layers[site]
            for outer in nesting.owners.get(site, {}):
                if outer in layers:
                    decide(outer)
            kept = layer.kept & ~nesting.taken_along(site, found, like=layer.kept)
            if layer.kept.any() and not kept.any():
                # the layer would lose all its structures: keep the outer one that holds the best of them
                best = layer.score.masked_fill(~layer.kept, torch.inf).argmin()
                for outer, owner in nesting.owners[site].items():
                    if outer in found and owner[best] >= 0:
                        found[outer][owner[best]] = False
                kept = layer.kept & ~nesting.taken_along(site, found, like=layer.kept)
            found[site] = replace(layer, kept=kept).decided()
        return found[site]

    return {site: decide(site) for site in layers}
