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
    """

    removed: Tensor
    score: Tensor
    kept: Tensor
    least: int = 1
    multiple: int = 1


def removals(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What goes of each layer: what is to, but for the floors; what lies inside of what goes; and what is read no more.

    >>> filters = Candidates(torch.tensor([True, False]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> positions = Candidates(torch.tensor([False, False, True]), torch.tensor([-2.0, -1.0, 0.5]),
    ...                        torch.tensor([True, True, True]))
    >>> inside = Nesting({"positions": {"filters": torch.tensor([0, 1, 1])}}, {"filters": torch.tensor([True, True])})
    >>> removals({"filters": filters, "positions": positions}, inside)
    {'filters': tensor([ True, False]), 'positions': tensor([ True, False,  True])}
    """
    layers = dict(layers)
    while True:
        removed = _with_what_lies_inside(layers, nesting)
        changed = False
        for site, layer in layers.items():
            for unread in nesting.inside(site, removed):
                last = torch.finfo(layer.score.dtype).max  # a floor that needs as many takes them last
                unread = unread & ~removed[site] & (layer.score < last)
                if unread.any():
                    layers[site] = replace(
                        layer, removed=layer.removed | unread, score=layer.score.masked_fill(unread, last)
                    )
                    changed = True
        if not changed:
            return removed


def _with_what_lies_inside(layers: Mapping[str, Candidates], nesting: Nesting) -> dict[str, Tensor]:
    """What goes of each layer, and what lies inside of it."""
    found: dict[str, Tensor] = {}

    def decide(site: str) -> Tensor:
        if site not in found:
            layer = layers[site]
            for outer in nesting.owners.get(site, {}):
                if outer in layers:
                    decide(outer)
            kept = layer.kept & ~_gone_around(site)
            if layer.kept.any() and not kept.any():
                # all that is left lies in what goes: what holds the best of it stays after all
                best = layer.score.masked_fill(~layer.kept, torch.inf).argmin()
                for outer, owner in nesting.owners[site].items():
                    if outer in found and owner[best] >= 0:
                        found[outer][owner[best]] = False
                kept = layer.kept & ~_gone_around(site)
            found[site] = with_floor(layer.removed | ~kept, layer.score, kept, layer.least, layer.multiple)
        return found[site]

    def _gone_around(site: str) -> Tensor:
        return torch.stack([torch.zeros_like(layers[site].kept), *nesting.around(site, found)]).any(0)

    return {site: decide(site) for site in layers}


def least_kept(min_kept: int, round_to: int | None, channels: int) -> tuple[int, int]:
    """(structures to keep at least, number of structures to keep a multiple of)."""
    return min_kept, 1 if round_to is None else round_to // math.gcd(round_to, channels)


def with_floor(removed: Tensor, score: Tensor, kept: Tensor, min_kept: int, multiple: int) -> Tensor:
    """`removed`, but for the structures with the lowest scores where too few, or an odd number, would stay.

    Args:
        removed, score, kept, min_kept, multiple: as in `Candidates`.
    """
    wanted = max(int((~removed).sum()), min_kept)
    wanted = min(-(-wanted // multiple) * multiple, int(kept.sum()))
    best = score.masked_fill(~kept, torch.inf).masked_fill(~removed, -torch.inf).argsort(stable=True)[:wanted]
    return removed.index_fill(0, best, False)
