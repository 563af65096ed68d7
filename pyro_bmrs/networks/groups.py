"""Structures: which channels of which modules are removed together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.cuts import COLUMNS, ROWS, Cuts, channels


@dataclass(frozen=True)
class Member:
    """One side of one module that belongs to a group of structures.

    indices[i] is a row or column of the module; units[i] is the structure that it belongs to. A structure can
    appear many times: a flattened filter owns many columns of the layer behind.
    """

    path: str
    # "producer" (rows), "between" (rows of a normalisation, a depthwise convolution, or an InputSelection behind
    # layers), "selection" (columns of such an InputSelection) or "consumer" (columns)
    role: str
    indices: Tensor
    units: Tensor

    @property
    def side(self) -> str:
        return COLUMNS if self.role in ("consumer", "selection") else ROWS

    def indices_of(self, units: Tensor) -> list[int]:
        """The rows or columns that belong to any of the structures `units`, in order."""
        chosen: list[int] = self.indices[torch.isin(self.units, units)].sort().values.tolist()
        return chosen


@dataclass(frozen=True)
class StructureGroup:
    """The structures of one latent site, one latent each, and all that is removed with each of them.

    Attributes:
        site: name of the latent site: the path of the first module that makes the structures (for heads the path of
            their attention; for a noise layer written by hand the path of that layer).
        features: number of structures.
        members: the modules that make, carry and read them.
        channels: number of channels of one structure where it is made: 1, or the size of a head.
        kind: "units" (outputs of linear layers), "filters" (of convolutions), "heads", "inputs" (of the network), or
            "positions" (of an InputSelection behind layers, for example of flattened filters).
        attributes: by module path and name, numbers that modules store about their structures; the value is the
            share of one structure.
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
        """The same group in a network that holds this one at `path`."""
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


def cuts_of(network: nn.Module, groups: Iterable[StructureGroup], kept: Mapping[str, Tensor]) -> Cuts:
    """The cuts that keep the structures where kept[site], a bool tensor (features,), is True."""
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
    """The groups in the network after `cuts`, with new numbers of structures and channels."""
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
                # a structure that stays may have lost parts, with the structures inside it
                there = torch.tensor([int(index) in position for index in indices], dtype=torch.bool)
                indices, units = indices[there], units[there]
                indices = torch.tensor([position[int(index)] for index in indices], dtype=torch.long)
            members.append(replace(member, indices=indices, units=new_unit[units]))
        renumbered.append(replace(group, features=int(keep.sum()), members=tuple(members)))
    return renumbered
