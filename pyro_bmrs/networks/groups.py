"""Structures: which entries of which tensors are removed together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.cuts import Cuts, RootMeanSquare, joined, names_by_tensor, tensor_of


@dataclass(frozen=True)
class Member:
    """Entries along one dimension of one tensor of a module that belong to structures.

    Entry indices[i] belongs to structure units[i]. A structure can own many: a flattened filter owns many columns of
    the layer behind.

    Attributes:
        path: of the module that owns the tensor.
        name: of its parameter or buffer, such as "weight".
        dim: dimension of the tensor.
        role: one of
            "producer": entries of a weight that makes the structures, or of the index of an `InputSelection`;
            "writer": of what is added to structures on which θ acts where they are made: biases, position
            embeddings, tokens;
            "between": of all else that is cut along: biases, normalisations, depthwise weights, the index of an
            `InputSelection` behind layers;
            "selection": numbers of such an `InputSelection`'s inputs, which its index holds;
            "both": of a weight that makes structures and reads them too;
            "consumer": of a weight that reads the structures.
        indices: entries along `dim`.
        units: structure of each of them.
        reader: of a consumer, path of the module whose forward uses the tensor. None: `path` itself.
        input_dim: of a consumer, dimension, counted from the end, of the first input of the module at `path` that
            meets `dim`: position p meets entry p modulo the tensor's size, as in a grouped convolution. None: θ
            multiplies the tensor itself, while the reader runs.
    """

    path: str
    name: str
    dim: int
    role: str
    indices: Tensor
    units: Tensor
    reader: str | None = None
    input_dim: int | None = None

    @property
    def read_by(self) -> str:
        """Path of the module whose forward uses the tensor."""
        return self.path if self.reader is None else self.reader

    def tensor(self, network: nn.Module) -> Tensor:
        """The tensor, as it is stored."""
        tensor = tensor_of(network.get_submodule(self.path), self.name)
        assert tensor is not None
        return tensor


@dataclass(frozen=True)
class Count:
    """An integer attribute of a module that counts entries of some axis, such as its number of heads.

    Attributes:
        path: of the module.
        name: of the attribute; "name.0" for the first entry of a tuple or list.
        size: its value.
        indices: entries of that axis.
        units: structure of each of them.
    """

    path: str
    name: str
    size: int
    indices: Tensor
    units: Tensor


@dataclass(frozen=True)
class StructureGroup:
    """The structures of one latent site, one latent each, and all that is removed with each of them.

    Attributes:
        site: name of the latent site: the path of the first module that makes the structures (for heads the path of
            their attention; for a noise layer written by hand the path of that layer).
        features: number of structures.
        members: entries of the tensors that make, carry and read them.
        channels: number of channels of one structure where it is made: 1, or the size of a head.
        kind: "units" (outputs of linear layers), "filters" (of convolutions), "heads", "inputs" (of the network), or
            "positions" (of an InputSelection behind layers, for example of flattened filters).
        counts: numbers that modules store about their structures.
        at_writers: False where θ multiplies what reads the structures; True where it multiplies what makes them. So it
            is for the channels of a stream that is normalised by its root mean square, where a removed channel has
            to be 0, and for a weight that both makes and reads.
        norms: modules that divide by the root mean square of the structures.
    """

    site: str
    features: int
    members: tuple[Member, ...]
    channels: int = 1
    kind: str = "units"
    counts: tuple[Count, ...] = ()
    at_writers: bool = False
    norms: tuple[RootMeanSquare, ...] = ()

    @property
    def multiplied(self) -> tuple[Member, ...]:
        """The members on which θ acts."""
        if not self.at_writers:
            return self.consumers
        return tuple(member for member in self.members if member.role in ("producer", "writer", "both"))

    @property
    def producers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role in ("consumer", "both"))

    def below(self, path: str) -> StructureGroup:
        """The same group in a network that holds this one at `path`."""
        if not path:
            return self

        def moved(member: Member) -> Member:
            reader = None if member.reader is None else joined(path, member.reader)
            return replace(member, path=joined(path, member.path), reader=reader)

        return replace(
            self,
            members=tuple(moved(member) for member in self.members),
            counts=tuple(replace(count, path=joined(path, count.path)) for count in self.counts),
            norms=tuple(replace(norm, path=joined(path, norm.path)) for norm in self.norms),
        )


def cuts_of(network: nn.Module, groups: Iterable[StructureGroup], kept: Mapping[str, Tensor]) -> Cuts:
    """The cuts that keep the structures where kept[site], a bool tensor (features,), is True."""
    groups = tuple(groups)
    names = names_by_tensor(network)
    tensors: dict[str, dict[int, Tensor]] = {}
    widths: dict[str, Tensor] = {}
    for group in groups:
        for member, gone in _gone(group, kept):
            if member.role == "selection":
                width = int(network.get_submodule(member.path).width)  # type: ignore[arg-type]
                stays = widths.setdefault(member.path, torch.ones(width, dtype=torch.bool))
                stays[gone] = False
                continue
            tensor = member.tensor(network)
            for name in names[id(tensor)]:
                stays = tensors.setdefault(name, {}).setdefault(
                    member.dim, torch.ones(tensor.shape[member.dim], dtype=torch.bool)
                )
                stays[gone] = False
    norms = [norm for group in groups if not bool(kept[group.site].all()) for norm in group.norms]
    numbers: dict[str, dict[str, int]] = {}
    for (path, name), left in _left_of_counts(groups, kept).items():
        numbers.setdefault(path, {})[name] = int(left.sum())
    return Cuts(
        {name: {dim: _true(stays) for dim, stays in dims.items()} for name, dims in tensors.items()},
        {path: _true(stays) for path, stays in widths.items()},
        numbers,
        tuple(dict.fromkeys(norms)),
    )


def after(groups: Iterable[StructureGroup], kept: Mapping[str, Tensor], cuts: Cuts) -> list[StructureGroup]:
    """The groups in the network after `cuts`, with new numbers of structures and entries."""
    groups = tuple(groups)
    left_of_counts = _left_of_counts(groups, kept)
    renumbered = []
    for group in groups:
        keep = kept[group.site].cpu()
        new_unit = torch.cumsum(keep, 0) - 1
        members, counts = [], []
        for member in group.members:
            stays = keep[member.units]
            indices, units = member.indices[stays], member.units[stays]
            table = (
                cuts.widths.get(member.path)
                if member.role == "selection"
                else cuts.tensors.get(joined(member.path, member.name), {}).get(member.dim)
            )
            if table is not None:
                left = torch.tensor(table)
                # a structure that stays may have lost parts, with the structures inside it
                there = torch.isin(indices, left)
                indices, units = torch.searchsorted(left, indices[there]), units[there]
            members.append(replace(member, indices=indices, units=new_unit[units]))
        for count in group.counts:
            left = left_of_counts.get((count.path, count.name), torch.ones(count.size, dtype=torch.bool))
            stays = left[count.indices]
            counts.append(
                replace(
                    count, size=int(left.sum()), indices=(torch.cumsum(left, 0) - 1)[count.indices[stays]],
                    units=new_unit[count.units[stays]],
                )
            )  # fmt: skip
        renumbered.append(
            replace(group, features=int(keep.sum()), members=tuple(members), counts=tuple(counts))
        )
    return renumbered


def _gone(group: StructureGroup, kept: Mapping[str, Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """(member, the entries that are removed) of each member that loses some."""
    keep = kept[group.site].cpu()
    for member in group.members:
        gone = member.indices[~keep[member.units]]
        if len(gone):
            yield member, gone


def _left_of_counts(
    groups: Iterable[StructureGroup], kept: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """By module path and attribute, True for the entries that are left, of each count that becomes smaller."""
    left: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        keep = kept[group.site].cpu()
        for count in group.counts:
            gone = count.indices[~keep[count.units]]
            if len(gone):
                stays = left.setdefault((count.path, count.name), torch.ones(count.size, dtype=torch.bool))
                stays[gone] = False
    return left


def _true(stays: Tensor) -> list[int]:
    chosen: list[int] = torch.nonzero(stays).flatten().tolist()
    return chosen
