"""How many parameters structures free, as tensors get smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.groups import StructureGroup


@dataclass
class Sizes:
    """How many parameters each structure of some groups frees, as tensors get smaller."""

    network: nn.Module
    groups: Sequence[StructureGroup]
    shapes: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = {id(parameter) for parameter in self.network.parameters()}
        self._counts: dict[str, dict[int, dict[int, Tensor]]] = {}
        self._freed: dict[str, Tensor] = {}  # until shapes change
        self.sharing: dict[int, list[str]] = {}
        for group in self.groups:
            mine = self._counts.setdefault(group.site, {})
            for member in group.members:
                if member.role == "selection":
                    continue
                tensor = member.tensor(self.network)
                if id(tensor) not in parameters:
                    continue
                self.shapes.setdefault(id(tensor), list(tensor.shape))
                counts = member.units.bincount(minlength=group.features)
                dims = mine.setdefault(id(tensor), {})
                # the same entries, read in several places, are freed once
                dims[member.dim] = torch.maximum(dims[member.dim], counts) if member.dim in dims else counts
                if group.site not in self.sharing.setdefault(id(tensor), []):
                    self.sharing[id(tensor)].append(group.site)

    def freed(self, site: str) -> Tensor:
        """Parameters that each structure of a group would free now. Shape: (structures,)."""
        if site not in self._freed:
            total: Tensor | float = 0.0
            for tensor, dims in self._counts[site].items():
                shape = self.shapes[tensor]
                after = math.prod(size - dims[dim] if dim in dims else size for dim, size in enumerate(shape))
                total = total + (math.prod(shape) - after)
            self._freed[site] = torch.as_tensor(total).double()
        return self._freed[site]

    def remove(self, site: str, structure: int) -> set[str]:
        """Take a structure away. Returns the groups whose numbers change."""
        changed: set[str] = set()
        for tensor, dims in self._counts[site].items():
            for dim, counts in dims.items():
                self.shapes[tensor][dim] -= int(counts[structure])
            changed.update(self.sharing[tensor])
        for other in changed:
            self._freed.pop(other, None)
        return changed
