"""The structures of a network: what can be removed together, and what stays, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from pyro_bmrs.arguments import on_a_screen
from pyro_bmrs.networks.computed import computed, has_computed
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.hooked_noise import hooked_noise, without_hooked_noise
from pyro_bmrs.networks.inputs import Inputs, batch_size, repeated
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.tracing.findings import matches
from pyro_bmrs.networks.tracing.grouping import Grouping, Refused
from pyro_bmrs.networks.tracing.ties import settle
from pyro_bmrs.networks.tracing.trace import Trace
from pyro_bmrs.notebooks import card, folded, grid


class StructureError(ValueError):
    """Structures of a network can't be handled. The message names the layers and says why."""


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

    def _repr_html_(self) -> str:
        columns = [
            ("name", "group", "text"), ("structures", "structures", ",.0f"), ("kind", "", "text"),
            ("channels", "channels of each", ",.0f"), ("read_by", "read by", "text"),
        ]  # fmt: skip
        rows = self.table.to_dict("records")
        kept = [row for row in rows if row["reason"]]
        stay = grid(
            [
                ("name", "stays", "text"),
                ("channels", "channels", ",.0f"),
                ("reason", "because it is", "text"),
            ],
            kept,
        )
        every = grid(columns, [row for row in rows if not row["reason"]])
        return card(
            str(self).partition("\n")[0],
            every,
            folded(f"{len(kept)} that can't be removed", stay) if kept else "",
        )

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
        grouping = traced(without_hooked_noise(copied(network)), example_input, most=2)
        layers = noise_layers(grouping.trace.network)
        paths = {layer: path for path, layer in grouping.trace.network.named_modules()}
        groups |= {site: _group_of_layer(grouping, site, paths[layers[site]]) for site in by_hand}
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
    network: nn.Module,
    example_input: Inputs,
    leave_out: Sequence[str] = (),
    in_training: AbstractSet[str] = frozenset(),
) -> tuple[Structures, AbstractSet[str]]:
    """The structures that a trace proposes for a network without noise. They are not yet tried.

    Args:
        network: traced as it is, in evaluation mode.
        leave_out: paths of modules or parameters, or patterns of them such as "layer4.*". Structures that touch these,
            or modules below them, stay.
        in_training: paths of the modules that run in training alone. What they read stays.

    Returns:
        The structures; and paths of modules whose input does not have one entry per example in its first dimension.

    Raises:
        StructureError: if the network can't be traced.
        ValueError: if an entry of `leave_out` matches no module.
    """
    paths = [
        path for path, _ in (*network.named_modules(), *network.named_parameters(remove_duplicate=False))
    ]
    for pattern in leave_out:
        if not any(matches(path, [pattern]) for path in paths):
            raise ValueError(
                f"leave_out must name modules or parameters of the network: none matches {pattern!r}"
            )
    grouping = traced(network, example_input, leave_out, in_training)
    groups, refused = grouping.groups()
    return Structures(groups, tuple(refused)), grouping.trace.noted.folded


def traced(
    network: nn.Module,
    example_input: Inputs,
    leave_out: Sequence[str] = (),
    in_training: AbstractSet[str] = frozenset(),
    *,
    most: int | None = None,
    through_layer_norms: bool = False,
) -> Grouping:
    """The classes of a network's rows, columns and entries, from one pass in evaluation mode.

    Args:
        most: so many of the examples, if the network can be called with them.
        through_layer_norms: whether the channels that a LayerNorm reads are followed one by one, as if it did not mix
            them.

    Raises:
        StructureError: if an operation fails under the trace.
    """
    network.eval()
    # at least two, so that the first dimension is not taken for another
    for example in (*_several(example_input, most), example_input):
        trace = Trace(network, example, through_layer_norms=through_layer_norms)
        try:
            trace.run()
            if in_training:
                trace.run_in_training(in_training)
        except Exception as error:
            if example is not example_input:
                continue
            raise StructureError(
                f"network can't be traced: {type(error).__name__} in {trace.here or 'the network itself'!r}: "
                f"{' '.join(str(error).split())}"
            ) from error
        break
    if example is example_input:
        trace.noted.folded |= trace.noted.called
    settle(trace)
    return Grouping(trace, leave_out)


def _several(example_input: Inputs, most: int | None) -> Iterator[Inputs]:
    """These examples, or some of them; two of a single one, if it can be repeated."""
    with suppress(Exception):  # what is not a plain tensor may not be taken apart
        count = batch_size(example_input)
        yield repeated(example_input, max(count if most is None else min(count, most), 2))


def _group_of_layer(grouping: Grouping, site: str, path: str) -> StructureGroup:
    """The group of a noise layer written by hand."""
    advice = "Take the noise layer out, or let pyro_bmrs.insert_noise place it"
    labels = grouping.noise(path)
    for other, theirs in grouping.noises():
        if other != path and set(labels) & set(theirs) - {0}:
            raise StructureError(
                f"noise layers {site!r} and {other!r} are both tied to the same structures. {advice}"
            )
    computed = [
        stays for stays in grouping.groups()[1] if stays.unsupported and "is computed from" in stays.reason
    ]
    read = all(grouping.is_made(one) and grouping.is_read(one) for one in labels)
    if computed and not (labels and read):
        raise StructureError(f"structures of noise layer {site!r}: {computed[0].reason}. {advice}")
    missing = "makes" if not all(map(grouping.is_made, labels)) else "behind it reads"
    if not labels or not read:
        raise StructureError(
            f"noise layer {site!r} can't be removed from: no linear or convolution layer {missing} its "
            "structures; put it between two such layers, or behind an InputSelection"
        )
    for one in labels:
        reason = grouping.reason(one)
        if reason:
            raise StructureError(f"structures of noise layer {site!r} are {reason}. {advice}")
    if len(set(labels)) < len(labels):
        raise StructureError(
            f"structures of noise layer {site!r} are tied to each other: its {len(labels)} form only "
            f"{len(set(labels))} that can be removed alone. {advice}"
        )
    return grouping.group_of(site, labels)


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
