"""What is tied to each noise layer's structures: the rows that make them, the columns that read them.

The coupling comes from torch-pruning's dependency graph; this file is the only one that knows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.networks.noise import MultiplicativeNoise, fixed_scales, noise_layers

_SHARED = (
    "noise layers {0!r} and {1!r} are both tied to {2}: branches that are added or concatenated are not handled. "
    "Take one of them out"
)


@dataclass(frozen=True)
class Member:
    """One dimension of one module that follows a noise layer's structures.

    indices[i] is a row or column of the module, units[i] the structure it belongs to. A filter that is
    flattened owns many columns of the layer behind, so a unit can appear many times.
    """

    path: str
    role: str  # "producer" (rows), "consumer" (columns) or "between" (normalisation)
    indices: Tensor
    units: Tensor
    _cut: Callable[[nn.Module, list[int]], Any] = field(repr=False)

    def indices_of(self, units: Tensor) -> list[int]:
        """The rows or columns that belong to any of `units` (indices of structures)."""
        chosen: list[int] = self.indices[torch.isin(self.units, units)].tolist()
        return chosen

    def cut(self, module: nn.Module, units: Tensor) -> None:
        """Remove, in place, what belongs to `units` from `module`."""
        indices = self.indices_of(units)
        if indices:
            self._cut(module, indices)


@dataclass(frozen=True)
class StructureGroup:
    """The structures of one noise layer and everything that goes when one of them goes."""

    site: str
    features: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "producer")

    @property
    def consumers(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "consumer")


def weight_of(network: nn.Module, member: Member) -> nn.Parameter:
    """The weight (rows, columns, …) of a producer or consumer."""
    weight = network.get_submodule(member.path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def structure_groups(network: nn.Module, example_input: Tensor) -> dict[str, StructureGroup]:
    """The coupled structures of each noise layer of `network`, by site name. The network is not changed.

    >>> import torch
    >>> from torch import nn
    >>> from pyro_bmrs import MultiplicativeNoise
    >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), MultiplicativeNoise(3), nn.Flatten(),
    ...                     nn.Linear(12, 2))
    >>> group = structure_groups(net, torch.zeros(1, 1, 4, 4))["2"]
    >>> [(m.role, m.path, m.indices_of(torch.tensor([1]))) for m in group.members]
    [('producer', '0', [1]), ('consumer', '4', [4, 5, 6, 7])]

    Raises:
        ValueError: if a noise layer has nothing in front that makes its structures, or nothing behind
            that reads them (the structures of an output or of the input can't be removed).
    """
    import torch_pruning

    class NoisePruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        """Makes the noise layer a node of the graph; it is taken out whole, never cut."""

        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: MultiplicativeNoise) -> int:
            return layer.features

        get_in_channels = get_out_channels

    # the graph is read off autograd: parameters must require gradients, and ours may be frozen
    traced = copy.deepcopy(network).requires_grad_(True).eval()
    layers = noise_layers(traced)
    pruner = NoisePruner()
    ones = {site: torch.ones_like(layer.kept, dtype=example_input.dtype) for site, layer in layers.items()}
    with torch.enable_grad(), fixed_scales(traced, ones):
        graph = torch_pruning.DependencyGraph().build_dependency(
            traced,
            example_inputs=example_input[:2],
            customized_pruners={MultiplicativeNoise: pruner},
            verbose=False,
        )
    paths = {module: path for path, module in traced.named_modules()}
    groups = {}
    for site, layer in layers.items():
        # a layer with no parametrised module before or behind it never becomes a node of the graph
        known = layer in graph.module2node
        every = list(range(layer.features))
        items = graph.get_pruning_group(layer, pruner.prune_out_channels, idxs=every).items if known else ()
        members = []
        for item in items:
            module, handler = item.dep.target.module, item.dep.handler
            if module is layer or module not in paths or not module.state_dict():
                continue
            if isinstance(module, MultiplicativeNoise):
                raise ValueError(_SHARED.format(site, module.site, "the same structures"))
            reads = graph.is_in_channel_pruning_fn(handler)
            between = isinstance(module, nn.modules.batchnorm._BatchNorm)
            plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if not between and not (plain and getattr(module, "groups", 1) == 1):
                raise ValueError(
                    f"structures of noise layer {site!r} are tied to {paths[module]!r}, a {type(module).__name__}"
                    f"{' in groups' if plain else ''}: only plain linear and convolution layers and BatchNorm are "
                    "handled. Take the noise layer out"
                )
            indices = torch.tensor(list(item.idxs), dtype=torch.long)
            roots = item.root_idxs if item.root_idxs is not None else item.idxs
            members.append(
                Member(
                    path=paths[module],
                    role="between" if between else "consumer" if reads else "producer",
                    indices=indices,
                    units=torch.tensor(list(roots), dtype=torch.long),
                    _cut=handler,
                )
            )
        members.sort(key=lambda member: ("producer", "between", "consumer").index(member.role))
        group = StructureGroup(site, layer.features, tuple(members))
        if not group.producers or not group.consumers:
            missing = "makes" if not group.producers else "behind it reads"
            raise ValueError(
                f"noise layer {site!r} can't be removed from: no linear or convolution layer {missing} its "
                "structures; put it between two such layers"
            )
        groups[site] = group
    _check_disjoint(groups)
    return groups


def _check_disjoint(groups: dict[str, StructureGroup]) -> None:
    """Raise where two noise layers are tied to the same rows or columns, as by an addition or concatenation."""
    owner: dict[tuple[str, str], str] = {}
    for site, group in groups.items():
        for member in group.members:
            other = owner.setdefault((member.path, member.role), site)
            if other != site:
                raise ValueError(_SHARED.format(other, site, f"{member.path!r} (as {member.role})"))
