"""What structures free, in parameters or in work, as tensors get smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.groups import StructureGroup


@dataclass
class Sizes:
    """How many parameters each structure of some groups frees, as tensors get smaller; or what else each entry costs.

    Attributes:
        each: by name of a parameter: what each of its entries costs. 0 of others. None: 1 of all, so that parameters
            are counted.
        shapes: by id of a parameter.
    """

    network: nn.Module
    groups: Sequence[StructureGroup]
    each: Mapping[str, float] | None = None
    shapes: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = {
            id(parameter): 1.0 if self.each is None else self.each.get(name, 0.0)
            for name, parameter in self.network.named_parameters()
        }
        self._counts: dict[str, dict[int, dict[int, Tensor]]] = {}
        self._costs: dict[int, float] = {}
        self._freed: dict[str, Tensor] = {}  # until shapes change
        self.sharing: dict[int, list[str]] = {}
        for group in self.groups:
            mine = self._counts.setdefault(group.site, {})
            for member in group.members:
                if member.role == "selection":
                    continue
                tensor = member.tensor(self.network)
                if not parameters.get(id(tensor)):
                    continue
                self._costs[id(tensor)] = parameters[id(tensor)]
                self.shapes.setdefault(id(tensor), list(tensor.shape))
                counts = member.units.bincount(minlength=group.features)
                dims = mine.setdefault(id(tensor), {})
                # the same entries, read in several places, are freed once
                dims[member.dim] = torch.maximum(dims[member.dim], counts) if member.dim in dims else counts
                if group.site not in self.sharing.setdefault(id(tensor), []):
                    self.sharing[id(tensor)].append(group.site)

    def freed(self, site: str) -> Tensor:
        """What each structure of a group would free now. Shape: (structures,)."""
        if site not in self._freed:
            total = torch.zeros((), dtype=torch.float64)
            for tensor, dims in self._counts[site].items():
                shape = self.shapes[tensor]
                after = math.prod(size - dims[dim] if dim in dims else size for dim, size in enumerate(shape))
                total = total + self._costs[tensor] * (math.prod(shape) - after)
            self._freed[site] = total
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
