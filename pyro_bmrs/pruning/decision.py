"""Which structures go, once each has a score: the bar, the floor of every layer, and structures inside others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_bmrs.networks.nesting import Nesting


@dataclass(frozen=True)
class Candidates:
    """The structures of a layer, and what is to become of them. Shapes: (features,).

    Attributes:
        removed: what is to go.
        score: those with the lowest stay where too few would.
        kept: False for what has gone before and can't come back.
        least: structures that stay at least, where so many can.
        multiple: as many stay as make a multiple of this, or all that can.
        unread: what nothing reads any longer: it goes, and of what has to go it is the last to stay; None: nothing.
    """

    removed: Tensor
    score: Tensor
    kept: Tensor
    least: int = 1
    multiple: int = 1
    unread: Tensor | None = None

    def gone(self) -> Tensor:
        """What goes: `removed` and `unread`, but for as many as the floor needs."""
        unread = torch.zeros_like(self.removed) if self.unread is None else self.unread
        goes = self.removed | unread | ~self.kept
        wanted = max(int((~goes).sum()), self.least)
        wanted = min(-(-wanted // self.multiple) * self.multiple, int(self.kept.sum()))
        order = self.score.argsort(stable=True)
        for later in (goes, unread, ~self.kept):
            order = order[later[order].int().argsort(stable=True)]
        return goes.index_fill(0, order[:wanted], False)


def removals(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What goes of each layer: what is to, but for the floors; what lies inside of what goes; and what is read no more.

    >>> filters = Candidates(torch.tensor([True, False]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> positions = Candidates(torch.tensor([False, False, True]), torch.tensor([-2.0, -1.0, 0.5]),
    ...                        torch.tensor([True, True, True]))
    >>> inside = Nesting({"positions": {"filters": torch.tensor([0, 1, 1])}}, {"filters": torch.tensor([True, True])})
    >>> removals({"filters": filters, "positions": positions}, inside)
    {'filters': tensor([ True, False]), 'positions': tensor([ True, False,  True])}
    """
    unread = {site: torch.zeros_like(layer.removed) for site, layer in layers.items()}
    while True:
        asked = {site: replace(layer, unread=unread[site]) for site, layer in layers.items()}
        gone = _with_what_lies_inside(asked, nesting)
        found = {site: unread[site] | (nesting.unread(site, gone) & ~gone[site]) for site in layers}
        if all(torch.equal(found[site], unread[site]) for site in layers):
            return gone
        unread = found


def _with_what_lies_inside(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What goes of each layer, and what lies inside of it."""
    found: dict[str, Tensor] = {}

    def decide(site: str) -> Tensor:
        if site not in found:
            layer = layers[site]
            for outer in nesting.owners.get(site, {}):
                if outer in layers:
                    decide(outer)
            kept = layer.kept & ~nesting.taken_along(site, found, like=layer.kept)
            if layer.kept.any() and not kept.any():
                # all that is left lies in what goes: what holds the best of it stays after all
                best = layer.score.masked_fill(~layer.kept, torch.inf).argmin()
                for outer, owner in nesting.owners[site].items():
                    if outer in found and owner[best] >= 0:
                        found[outer][owner[best]] = False
                kept = layer.kept & ~nesting.taken_along(site, found, like=layer.kept)
            found[site] = replace(layer, kept=kept).gone()
        return found[site]

    return {site: decide(site) for site in layers}


def least_kept(min_kept: int, round_to: int | None, channels: int) -> tuple[int, int]:
    """(structures to keep at least, number of structures to keep a multiple of)."""
    return min_kept, 1 if round_to is None else round_to // math.gcd(round_to, channels)
