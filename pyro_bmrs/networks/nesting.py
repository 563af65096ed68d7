"""Structures inside structures: which lie inside which, and which are read only through structures inside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.networks.groups import StructureGroup


@dataclass(frozen=True)
class Nesting:
    """Which structures lie inside others, such as the positions of a flattened filter behind an `InputSelection`.

    Attributes:
        owners: by inner and outer layer, the outer structure of each inner one; -1 for none. An inner structure is
            removed with its outer one. Shape: (features of the inner layer,).
        enclosed: by outer layer, True for structures that are read only through structures inside them. They are
            removed once all of these are. Shape: (features of the outer layer,).
    """

    owners: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    enclosed: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Iterable[StructureGroup]) -> Nesting:
        """The nesting of a network's structures."""
        groups = tuple(groups)
        owners: dict[str, dict[str, Tensor]] = {}
        enclosed: dict[str, Tensor] = {}
        for outer in groups:
            inside = [(inner, owner) for inner in groups if (owner := _owner(inner, outer)) is not None]
            for inner, owner in inside:
                owners.setdefault(inner.site, {})[outer.site] = owner
            if inside:
                enclosed[outer.site] = _enclosed(outer, [inner for inner, _ in inside])
        return cls(owners, enclosed)

    def spread(self, present: Mapping[str, Tensor]) -> Nesting:
        """The same nesting with numbers among more structures. present[layer] is True for the structures known here."""
        rows = {site: torch.nonzero(there.cpu()).flatten() for site, there in present.items()}

        def among(site: str, values: Tensor, filling: int | bool) -> Tensor:
            return torch.full((len(present[site]),), filling).index_put((rows[site],), values)

        return Nesting(
            {
                inner: {
                    outer: among(inner, torch.where(owner < 0, owner, rows[outer][owner.clamp(min=0)]), -1)
                    for outer, owner in outers.items()
                }
                for inner, outers in self.owners.items()
            },
            {outer: among(outer, values, False) for outer, values in self.enclosed.items()},
        )

    def taken_along(self, inner: str, removed: Mapping[str, Tensor], *, like: Tensor) -> Tensor:
        """True for structures of `inner` inside what is `removed` of other layers. Shape: that of `like`."""
        taken = torch.zeros_like(like)
        for outer, owner in self.owners.get(inner, {}).items():
            if outer in removed:
                taken |= removed[outer][owner.clamp(min=0)] & (owner >= 0)
        return taken

    def unread(self, outer: str, removed: Mapping[str, Tensor]) -> Tensor:
        """True for structures of `outer` that no layer reads any more, since all structures inside them are removed."""
        inside = {inner: outers[outer] for inner, outers in self.owners.items() if outer in outers}
        # a layer outside `removed` loses nothing
        if not inside or not inside.keys() <= removed.keys():
            return torch.zeros_like(removed[outer])
        unread = self.enclosed[outer].clone()
        for inner, owner in inside.items():
            unread[owner[(owner >= 0) & ~removed[inner]]] = False
        return unread

    def to_json(self) -> dict[str, Any]:
        return {
            "owners": {
                inner: {outer: owner.tolist() for outer, owner in outers.items()}
                for inner, outers in self.owners.items()
            },
            "enclosed": {outer: values.tolist() for outer, values in self.enclosed.items()},
        }

    @classmethod
    def from_json(cls, document: Any, sizes: Mapping[str, int]) -> Nesting:
        """The nesting from `to_json`, for layers of these sizes.

        Raises:
            ValueError: if it names a layer or structure that does not exist, or a layer lies inside itself.
        """
        if not _is_nesting(document, sizes):
            raise ValueError(f"its nesting can't be {document!r}"[:200])
        TopologicalSorter(document["owners"]).prepare()
        return cls(
            {
                inner: {outer: torch.tensor(owner) for outer, owner in outers.items()}
                for inner, outers in document["owners"].items()
            },
            {outer: torch.tensor(values) for outer, values in document["enclosed"].items()},
        )


def _owner(inner: StructureGroup, outer: StructureGroup) -> Tensor | None:
    """For each structure of `inner` the one of `outer` around it, -1 for none; None if `inner` is not in `outer`."""
    made_by = {member.path: member for member in inner.producers}
    passed = {member.path for member in outer.members if member.role == "selection"}
    for member in outer.members:
        if member.role == "between" and member.path in passed & set(made_by):
            unit_of = dict(zip(member.indices.tolist(), member.units.tolist(), strict=True))
            chosen = made_by[member.path]
            owner = torch.full((inner.features,), -1)
            owner[chosen.units] = torch.tensor([unit_of.get(index, -1) for index in chosen.indices.tolist()])
            return owner
    return None


def _enclosed(outer: StructureGroup, inside: Iterable[StructureGroup]) -> Tensor:
    """True for structures that every reader reads through a structure inside."""
    through = {
        (member.path, member.name, member.dim, index)
        for inner in inside
        for member in inner.consumers
        for index in member.indices.tolist()
    }
    enclosed = torch.ones(outer.features, dtype=torch.bool)
    for member in outer.consumers:
        for index, unit in zip(member.indices.tolist(), member.units.tolist(), strict=True):
            if (member.path, member.name, member.dim, index) not in through:
                enclosed[unit] = False
    return enclosed


def _is_nesting(document: Any, sizes: Mapping[str, int]) -> bool:
    """Whether a JSON document is a nesting of layers of these sizes."""
    if not isinstance(document, dict) or set(document) != {"owners", "enclosed"}:
        return False
    owners, enclosed = document["owners"], document["enclosed"]
    return (
        isinstance(owners, dict)
        and isinstance(enclosed, dict)
        and all(isinstance(outers, dict) for outers in owners.values())
        and {*owners, *enclosed} <= set(sizes)
        and set(enclosed) == {outer for outers in owners.values() for outer in outers}
        and all(
            isinstance(owner, list)
            and len(owner) == sizes[inner]
            and all(type(index) is int and -1 <= index < sizes[outer] for index in owner)
            for inner, outers in owners.items()
            for outer, owner in outers.items()
        )
        and all(
            isinstance(values, list)
            and len(values) == sizes[outer]
            and all(type(value) is bool for value in values)
            for outer, values in enclosed.items()
        )
    )
