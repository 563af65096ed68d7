"""Which structures go, once each has a score: the bar, the floor of every layer, and structures inside others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# owners[inner][outer] has, for each structure of a layer, that of another it lies inside, -1 for none.
Owners = Mapping[str, Mapping[str, Tensor]]


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


def removals(layers: Mapping[str, Candidates], owners: Owners) -> dict[str, Tensor]:
    """What goes of each layer: what is to, but for the floors, and what lies inside of what goes.

    >>> filters = Candidates(torch.tensor([True, False]), torch.tensor([1.0, -1.0]), torch.tensor([True, True]))
    >>> positions = Candidates(torch.tensor([False, False, True]), torch.tensor([-2.0, -1.0, 0.5]),
    ...                        torch.tensor([True, True, True]))
    >>> removals({"filters": filters, "positions": positions}, {"positions": {"filters": torch.tensor([0, 1, 1])}})
    {'filters': tensor([ True, False]), 'positions': tensor([ True, False,  True])}
    """
    found: dict[str, Tensor] = {}

    def owners_of(site: str) -> dict[str, Tensor]:
        return {outer: owner for outer, owner in owners.get(site, {}).items() if outer in layers}

    def outside(site: str) -> Tensor:
        """What of a layer can stay: it has not gone before, and lies in nothing that goes."""
        kept = layers[site].kept
        for outer, owner in owners_of(site).items():
            kept = kept & ~(decide(outer)[owner.clamp(min=0)] & (owner >= 0))
        return kept

    def decide(site: str) -> Tensor:
        if site not in found:
            layer, kept = layers[site], outside(site)
            if layer.kept.any() and not kept.any():
                # all that is left lies in what goes: what holds the best of it stays after all
                best = layer.score.masked_fill(~layer.kept, torch.inf).argmin()
                for outer, owner in owners_of(site).items():
                    if owner[best] >= 0:
                        found[outer][owner[best]] = False
                kept = outside(site)
            found[site] = with_floor(layer.removed | ~kept, layer.score, kept, layer.least, layer.multiple)
        return found[site]

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
