"""Structures: which channels of which modules go together when one structure goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.cuts import COLUMNS, ROWS, Cuts, channels


@dataclass(frozen=True)
class Member:
    """One side of one module that follows a group of structures.

    indices[i] is a row or column of the module, units[i] the structure it belongs to. A filter that is
    flattened owns many columns of the layer behind, so a structure can appear many times.
    """

    path: str
    # "producer" (rows), "between" (rows: normalisation, depthwise convolution, a selection among what was made),
    # "selection" (columns: what such a selection is given) or "consumer" (columns)
    role: str
    indices: Tensor
    units: Tensor

    @property
    def side(self) -> str:
        return COLUMNS if self.role in ("consumer", "selection") else ROWS

    def indices_of(self, units: Tensor) -> list[int]:
        """The rows or columns that belong to any of `units` (indices of structures), in order."""
        chosen: list[int] = self.indices[torch.isin(self.units, units)].sort().values.tolist()
        return chosen


@dataclass(frozen=True)
class StructureGroup:
    """Structures that are counted together, one latent each, and everything that goes when one of them goes.

    Attributes:
        site: name of the latent site: the path of the first module that makes the structures (of heads: of
            their attention; of a noise layer written by hand: of that layer).
        features: number of structures.
        members: what makes, carries and reads them.
        channels: channels that one structure has where it is made: 1, or the size of a head.
        kind: "units" (of linear layers), "filters" (of convolutions), "heads", "inputs" (of the network), or
            "positions" (selected among what layers made: of a flattened filter, say).
        attributes: numbers that modules keep about their structures: by module path and name, how much of
            it one structure accounts for.
    """

    site: str
    features: int
    members: tuple[Member, ...]
    channels: int = 1
    kind: str = "units"
    attributes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def producers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "consumer")

    def below(self, path: str) -> StructureGroup:
        """The same group seen from a network that holds this one at `path`."""
        if not path:
            return self
        return replace(
            self,
            members=tuple(replace(member, path=f"{path}.{member.path}") for member in self.members),
            attributes={f"{path}.{name}": numbers for name, numbers in self.attributes.items()},
        )


def weight_of(network: nn.Module, member: Member) -> nn.Parameter:
    """The weight of a producer or consumer."""
    weight = network.get_submodule(member.path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def gone(network: nn.Module, groups: Iterable[StructureGroup], kept: Mapping[str, Tensor]) -> Cuts:
    """The cuts that leave the kept structures: kept[site] is a bool tensor (features,)."""
    removed: dict[tuple[str, str], set[int]] = {}
    attributes: dict[str, dict[str, int]] = {}
    for group in groups:
        keep = kept[group.site].cpu()
        units = torch.nonzero(~keep).flatten()
        if not len(units):
            continue
        for member in group.members:
            removed.setdefault((member.side, member.path), set()).update(member.indices_of(units))
        for path, numbers in group.attributes.items():
            for name, share in numbers.items():
                attributes.setdefault(path, {})[name] = share * int(keep.sum())
    sides: dict[str, dict[str, list[int]]] = {ROWS: {}, COLUMNS: {}}
    for (side, path), indices in removed.items():
        size = channels(network.get_submodule(path), side)
        assert size is not None
        sides[side][path] = [index for index in range(size) if index not in indices]
    return Cuts(sides[ROWS], sides[COLUMNS], attributes)


def after(groups: Iterable[StructureGroup], kept: Mapping[str, Tensor], cuts: Cuts) -> list[StructureGroup]:
    """The groups as they are in the network that `cuts` leaves, structures and channels counted anew."""
    renumbered = []
    for group in groups:
        keep = kept[group.site].cpu()
        new_unit = torch.cumsum(keep, 0) - 1
        members = []
        for member in group.members:
            table = cuts.columns if member.side == COLUMNS else cuts.rows
            indices, units = member.indices[keep[member.units]], member.units[keep[member.units]]
            if member.path in table:
                position = {old: new for new, old in enumerate(table[member.path])}
                # of a structure that stays some may have left with structures inside it
                there = torch.tensor([int(index) in position for index in indices], dtype=torch.bool)
                indices, units = indices[there], units[there]
                indices = torch.tensor([position[int(index)] for index in indices], dtype=torch.long)
            members.append(replace(member, indices=indices, units=new_unit[units]))
        renumbered.append(replace(group, features=int(keep.sum()), members=tuple(members)))
    return renumbered
