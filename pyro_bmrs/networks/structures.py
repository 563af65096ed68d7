"""The structures of a network: what can be removed together, and what stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd
from torch import nn

from pyro_bmrs.arguments import on_a_screen
from pyro_bmrs.networks.channels import ROWS, channels
from pyro_bmrs.networks.computed import computed, has_computed
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.dependency_graph import DependencyGraph, StructureError
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.hooked_noise import hooked_noise, without_hooked_noise
from pyro_bmrs.networks.inputs import Inputs
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers


@dataclass(frozen=True)
class Refused:
    """Channels that stay, and why.

    Attributes:
        path: the first module that makes them.
        channels: their number.
        reason: why none of them can be removed without changing the others.
    """

    path: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Structures:
    """All channels that a network's layers make: those that can be removed, in groups, and those that can't.

    Attributes:
        groups: one group per latent site, by site name, in the order of the network's modules.
        refused: channels that stay, with the reason.
    """

    groups: dict[str, StructureGroup]
    refused: tuple[Refused, ...] = ()

    def __iter__(self) -> Iterator[StructureGroup]:
        return iter(self.groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def table(self) -> pd.DataFrame:
        """One row per group, removable or not: name, kind, size, and the modules that make, carry and read it."""
        rows: list[dict[str, Any]] = []
        for group in self:
            by_role = {
                role: ", ".join(dict.fromkeys(m.path for m in group.members if m.role == role))
                for role in ("producer", "consumer")
            }
            makers = {member.path for member in group.producers}
            carriers = dict.fromkeys(
                m.path for m in group.members if m.role == "between" and m.path not in makers
            )
            rows.append(
                {
                    "name": group.site,
                    "kind": group.kind,
                    "structures": group.features,
                    "channels": group.channels,
                    "made_by": by_role["producer"],
                    "carried_by": ", ".join(carriers),
                    "read_by": by_role["consumer"],
                    "reason": "",
                }
            )
        rows += [
            {"name": r.path, "channels": r.channels, "structures": 0, "reason": r.reason}
            for r in self.refused
        ]
        return pd.DataFrame(rows, columns=_COLUMNS).fillna("")

    def __repr__(self) -> str:
        return on_a_screen(str(self))

    def __str__(self) -> str:
        lines = [f"{sum(group.features for group in self)} structures in {len(self)} groups"]
        for group in self:
            each = f" of {group.channels} channels" if group.channels > 1 else ""
            readers = ", ".join(dict.fromkeys(member.read_by for member in group.consumers))
            lines.append(f"  {group.site}: {group.features} {group.kind}{each}, read by {readers}")
        if self.refused:
            lines.append("not removable:")
            lines += [f"  {r.path}: {r.channels} channels, {r.reason}" for r in self.refused]
        return "\n".join(lines)


_COLUMNS = ["name", "kind", "structures", "channels", "made_by", "carried_by", "read_by", "reason"]


def structure_groups(network: nn.Module, example_input: Inputs) -> dict[str, StructureGroup]:
    """The structures of each noise layer of `network`, by site name. The network is not changed.

    >>> import torch
    >>> from torch import nn
    >>> from pyro_bmrs import MultiplicativeNoise
    >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), MultiplicativeNoise(3), nn.Flatten(),
    ...                     nn.Linear(12, 2))
    >>> group = structure_groups(net, torch.zeros(1, 1, 4, 4))["2"]
    >>> for m in group.members:
    ...     print(m.role, m.path, m.name, m.dim, m.indices[m.units == 1].tolist())
    producer 0 weight 0 [1]
    between 0 bias 0 [1]
    consumer 4 weight 1 [4, 5, 6, 7]

    Raises:
        StructureError: for a noise layer written by hand, if no layer in front makes its structures or
            no layer behind reads them; if two such layers are tied to one channel; or if one is tied to a
            layer that can't be cut. For any noise, if a weight to be cut is computed from other tensors.
    """
    groups = {
        group.site: group.below(path)
        for path, noise in hooked_noise(network).items()
        for group in noise.groups.values()
    }
    by_hand = [site for site in noise_layers(network) if site not in groups]
    if by_hand:
        graph = DependencyGraph(without_hooked_noise(copied(network)), example_input)
        groups |= {site: _group_of_layer(graph, site) for site in by_hand}
        _refuse_overlaps(groups)
    for group in groups.values():
        for member in group.members:
            wrong = computed(network.get_submodule(member.path), member.name, member.path)
            if wrong:
                raise StructureError(f"structures of {group.site!r}: {wrong}")
    return groups


def check_weights(network: nn.Module, find_input: Callable[[], Inputs]) -> None:
    """Raise StructureError, before a fit, if a layer that noise belongs to has a weight that is computed.

    Args:
        network: has noise layers; not changed.
        find_input: makes a batch of inputs. Called only if some weight is computed.
    """
    if any(has_computed(module) for module in network.modules()):
        structure_groups(network, find_input())


def find_structures(
    network: nn.Module, example_input: Inputs, leave_out: Sequence[str] = ()
) -> tuple[Structures, dict[str, str]]:
    """The structures that the dependency graph proposes for a network without noise. They are not yet tried.

    Args:
        leave_out: paths of modules or parameters, or patterns of them such as "layer4.*". Structures that touch these,
            or modules below them, stay.

    Returns:
        The structures; and by path, for each layer that can't be followed, an explanation.

    Raises:
        StructureError: if the graph can't be made, or two groups contain the same channel.
        ValueError: if an entry of `leave_out` matches no module.
    """
    paths = [path for path, _ in (*network.named_modules(), *network.named_parameters())]
    for pattern in leave_out:
        if not any(_matches(path, [pattern]) for path in paths):
            raise ValueError(
                f"leave_out must name modules or parameters of the network: none matches {pattern!r}"
            )
    graph = DependencyGraph(copied(network), example_input)
    groups: dict[str, StructureGroup] = {}
    refused: list[Refused] = []
    unknown: dict[str, str] = {}
    covered: dict[str, set[int]] = {}
    for path, module in graph.producers():
        size = channels(module, ROWS)
        assert size is not None
        rows = [row for row in range(size) if row not in covered.get(path, ())]
        if not rows:
            continue
        try:
            reach = graph.reach(module, rows)
        except Exception as error:  # the graph does not know every operation
            unknown[path] = f"{path!r} can't be followed ({type(error).__name__}: {error})"
            continue
        for made, indices in reach.rows():
            covered.setdefault(made, set()).update(indices)
        covered.setdefault(path, set()).update(rows)
        left = next((touched for touched in reach.touched() if _matches(touched, leave_out)), None)
        if left is not None:
            words = "left out" if left == path else f"tied to {left!r}, which is left out"
            refused.append(Refused(path, len(rows), words))
            continue
        reason = reach.reason()
        if reason:
            refused.append(Refused(path, len(rows), reason))
            continue
        culprit = reach.not_understood()
        if culprit:
            unknown[culprit[0]] = culprit[1]
            continue
        group = reach.group(path)
        if set(range(group.features)) != {unit for m in group.consumers for unit in m.units.tolist()}:
            unknown[path] = f"some of the channels of {path!r} can't be followed to a layer that reads them"
            continue
        if group.features < 2:
            refused.append(Refused(path, len(rows), "a single structure, and one must stay"))
        else:
            groups[group.site] = group
    for path, module in graph.network.named_modules():
        matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
        if matrices and path not in covered and path not in unknown:
            known = channels(module, ROWS) is not None
            reason = (
                f"a {type(module).__name__}, no layer that can be cut" if not known or graph.calls[module] else
                "never called itself: other code uses its weight, or nothing does"
            )  # fmt: skip
            count = channels(module, ROWS) or max(p.shape[0] for p in matrices)
            refused.append(Refused(path or "(itself)", count, reason))
    _refuse_overlaps(groups)
    return Structures(groups, tuple(refused)), unknown


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(
        path == pattern or path.startswith(f"{pattern}.") or fnmatchcase(path, pattern)
        for pattern in patterns
    )


def _group_of_layer(graph: DependencyGraph, site: str) -> StructureGroup:
    """The group of a noise layer written by hand."""
    layer = graph.noise[site]
    advice = "Take the noise layer out, or let pyro_bmrs.insert_noise place it"
    if layer in graph.nodes:
        reach = graph.reach(layer, list(range(layer.features)))
        for other in reach.noise():
            # an InputSelection behind these structures may have its own noise layer
            inside = reach.selections() and layer not in graph.reach(other, [*range(other.features)]).noise()
            if other is not layer and not inside:
                raise StructureError(
                    f"noise layers {site!r} and {other.site!r} are both tied to the same structures. {advice}"
                )
        mixing = reach.mixing()
        if mixing:
            raise StructureError(f"structures of noise layer {site!r} are {mixing}. {advice}")
        culprit = reach.not_understood()
        if culprit:
            raise StructureError(f"structures of noise layer {site!r}: {culprit[1]}. {advice}")
        group = reach.group(site, by_hand=True)
    # a noise layer with no module with parameters in front or behind never becomes a node of the graph
    if layer not in graph.nodes or not group.producers or not group.consumers:
        missing = "makes" if layer not in graph.nodes or not group.producers else "behind it reads"
        raise StructureError(
            f"noise layer {site!r} can't be removed from: no linear or convolution layer {missing} its "
            "structures; put it between two such layers, or behind an InputSelection"
        )
    if group.features != layer.features:
        raise StructureError(
            f"structures of noise layer {site!r} are tied to each other: its {layer.features} form only "
            f"{group.features} that can be removed alone. {advice}"
        )
    return group


def _refuse_overlaps(groups: dict[str, StructureGroup]) -> None:
    """Raise StructureError if two groups contain the same entry of a tensor, and neither lies inside the other."""
    inside = {
        (inner, outer) for inner, outers in Nesting.of(groups.values()).owners.items() for outer in outers
    }
    inside |= {(outer, inner) for inner, outer in inside}
    owner: dict[tuple[str, str, int, bool, int], str] = {}
    for site, group in groups.items():
        for member in group.members:
            axis = (member.path, member.name, member.dim, member.role == "selection")
            for index in member.indices.tolist():
                other = owner.setdefault((*axis, index), site)
                if other != site and (other, site) not in inside:
                    raise StructureError(
                        f"structures of {other!r} and {site!r} are both tied to {member.path!r} (its {member.name}). "
                        f"Leave one of them as it is, with leave_out={[site]} or without its noise layer"
                    )
