"""In which order the structures of a trained network are removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check
from pyro_bmrs.evidence.kronecker import KroneckerCurvature
from pyro_bmrs.networks.groups import Member, StructureGroup
from pyro_bmrs.networks.matrices import columns_of, input_dim, is_matrix
from pyro_bmrs.progress import Progress
from pyro_bmrs.pruning.layer_states import LayerEvidence, LayerLoss, LayerState
from pyro_bmrs.pruning.sizes import Sizes

# Of a layer with many structures some are removed together: one of so many that are left.
_TOGETHER = 32


@dataclass(frozen=True)
class Part:
    """What the structures of a group have in one layer.

    Attributes:
        path: of the layer.
        places: inputs of its matrix, the same in each block; or outputs, as numbers over all blocks.
            Shape: (structures, of each).
    """

    path: str
    places: Tensor


@dataclass(frozen=True)
class Touched:
    """What a group of structures touches in layers with curvature.

    Attributes:
        reads: the inputs of layers that read the structures.
        brings: the outputs of layers that make or carry them, which nothing reads without them.
    """

    reads: tuple[Part, ...]
    brings: tuple[Part, ...]


class NoCurvatureError(ValueError):
    """Something that reads structures of a group has no curvature: what is lost without them can't be told."""


def touched(
    network: nn.Module, group: StructureGroup, curvatures: Mapping[str, KroneckerCurvature]
) -> Touched:
    """What a group touches.

    Raises:
        NoCurvatureError: if θ acts where the structures are made, or what reads them has no curvature.
    """
    if group.at_writers:
        raise NoCurvatureError(
            "θ acts where they are made, as in a stream that a root mean square is taken of"
        )
    reads, brings = [], []
    for member in group.members:
        module = network.get_submodule(member.path)
        known = is_matrix(module) and member.path in curvatures and member.name == "weight"
        if member.role in ("consumer", "both"):
            if not known or member.dim != input_dim(module) or member.role == "both":
                raise NoCurvatureError(f"read by {member.read_by!r}, which has no curvature")
            channels = _by_structure(member, group.features)
            if curvatures[member.path].positions is None:
                channels = columns_of(module, channels).flatten(1)
            reads.append(Part(member.path, channels))
        elif known and member.role != "selection" and member.dim == 1 - input_dim(module):
            brings.append(Part(member.path, _by_structure(member, group.features)))
    several = {part.path for part in reads if sum(part.path == other.path for other in reads) > 1}
    if several:
        raise NoCurvatureError(f"read several times by the weight of {min(several)!r}")
    if not reads:
        raise NoCurvatureError("read by nothing that has curvature")
    return Touched(tuple(reads), tuple(brings))


def _by_structure(member: Member, features: int) -> Tensor:
    """The entries of each structure. Shape: (structures, entries of each)."""
    counts = member.units.bincount(minlength=features)
    if bool((counts != counts[0]).any()):
        raise NoCurvatureError(f"structures have different numbers of entries in {member.path!r}")
    return member.indices[member.units.argsort(stable=True)].view(features, -1)


@dataclass(frozen=True)
class RemovalOrder:
    """In which order the structures of a trained network are removed.

    Attributes:
        by: "loss": the least predicted rise of the loss first; "evidence": the largest ΔF of the next structure first.
        per: what both are divided by: the parameters, or the multiply-accumulates of one example, that it frees.
            None: nothing.

    >>> RemovalOrder(by="evidence")
    RemovalOrder(by='evidence', per='parameter')
    """

    by: Literal["loss", "evidence"] = "loss"
    per: Literal["parameter", "multiply_accumulate"] | None = "parameter"

    def __post_init__(self) -> None:
        check(self.by in ("loss", "evidence"), "by", '"loss" or "evidence"', self.by)
        good = self.per in ("parameter", "multiply_accumulate", None)
        check(good, "per", '"parameter", "multiply_accumulate" or None', self.per)

    def __str__(self) -> str:
        return f"{self.by}_per_{self.per}" if self.per else self.by


@dataclass(frozen=True)
class Step:
    """One structure of a path.

    Attributes:
        site, structure: which.
        loss: the rise of the loss over the data set that it is predicted to add, in nats.
        freed: parameters that it frees.
    """

    site: str
    structure: int
    loss: float
    freed: int


def removal_path(
    network: nn.Module,
    groups: Sequence[StructureGroup],
    parts: Mapping[str, Touched],
    curvatures: Mapping[str, KroneckerCurvature],
    floors: Mapping[str, int],
    order: RemovalOrder,
    deltas: Mapping[str, float],
    brought: Mapping[str, Tensor],
    *,
    each: Mapping[str, float] | None = None,
    progress: bool = True,
) -> list[Step]:
    """Remove one structure after the other, until each group is at its floor.

    What each costs is summed over the layers that read it, and taken anew in these layers as structures leave.

    Args:
        floors: by site, how many structures stay at least.
        order: which is the next one.
        deltas: by path of a layer, δ.
        brought: by site, the incoming part of ΔF of each structure.
        each: by name of a parameter: what each of its entries costs, where the order is not per parameter.
        progress: show a bar, on a terminal.
    """
    groups = [group for group in groups if group.site in parts]
    paths = dict.fromkeys(part.path for group in groups for part in parts[group.site].reads)
    losses = {path: LayerLoss(curvatures[path]) for path in paths}
    evidences = None
    if order.by == "evidence":
        evidences = {path: LayerEvidence(curvatures[path], deltas[path]) for path in paths}
    sizes = Sizes(network, groups)
    units = sizes if each is None else Sizes(network, groups, each)
    left = _Left(sizes, units, groups, parts, floors, order, brought, losses, evidences)
    steps: list[Step] = []
    with Progress(
        "removal", sum(group.features - floors[group.site] for group in groups), shown=progress
    ) as bar:
        while (site := left.next_site()) is not None:
            steps += left.remove_some(site)
            bar.advance(len(steps) - bar.done)
    return steps


class _Left:
    """What is left of the groups along a path, and which structures go next.

    Args:
        sizes: the parameters that they free.
        units: what they free of that by which what decides is divided; may be `sizes`.
        losses: by path of a layer that reads structures, what its loss rises by.
        evidences: what decides in place of it; None: nothing else.
        others: as of `removal_path`.
    """

    def __init__(
        self,
        sizes: Sizes,
        units: Sizes,
        groups: Sequence[StructureGroup],
        parts: Mapping[str, Touched],
        floors: Mapping[str, int],
        order: RemovalOrder,
        brought: Mapping[str, Tensor],
        losses: Mapping[str, LayerLoss],
        evidences: Mapping[str, LayerEvidence] | None,
    ) -> None:
        self.sizes, self.units, self.floors, self.order, self.brought = sizes, units, floors, order, brought
        self.reads = {group.site: parts[group.site].reads for group in groups}
        self.losses, self.evidences = losses, evidences
        self.left = {group.site: torch.ones(group.features, dtype=torch.bool) for group in groups}
        self.readers: dict[str, dict[str, None]] = {}
        for site, reads in self.reads.items():
            for part in reads:
                self.readers.setdefault(part.path, {})[site] = None
        # of each read of a group: what its structures cost there
        self.costs = {site: [self._cost(site, part) for part in reads] for site, reads in self.reads.items()}
        self.scores: dict[str, Tensor] = {}
        for site in self.reads:
            self._score(site)

    def next_site(self) -> str | None:
        """The group of the next structure; None at the end."""
        site = min(self.scores, key=lambda name: float(self.scores[name].min()), default=None)
        return None if site is None or not float(self.scores[site].min()) < torch.inf else site

    def remove_some(self, site: str) -> list[Step]:
        """Remove the next structures, of a group: those that go before one of another group does.

        They are among the cheapest few. What each removal changes is taken into account among these at once, exactly,
        and in all else afterwards.
        """
        score, reads, left = self.scores[site], self.reads[site], self.left[site]
        most = min(1 + int(left.sum()) // _TOGETHER, int(left.sum()) - self.floors[site])
        nearest = score.argsort(stable=True)[: most + 1]
        few, bound = nearest[:most], min(float(score[nearest].max()), self._least_of_others(site))
        places = [torch.arange(part.places[few].numel()).view(len(few), -1) for part in reads]
        losses = [self.losses[part.path].part(part.places[few].flatten()) for part in reads]
        deciding: Sequence[LayerState] = losses
        if self.evidences is not None:
            deciding = [self.evidences[part.path].part(part.places[few].flatten()) for part in reads]
        there, steps, changed = torch.ones(len(few), dtype=torch.bool), list[Step](), set[str]()
        while bool(there.any()):
            some = torch.nonzero(there).flatten()
            costs = [state.of_sets(own[some]) for state, own in zip(deciding, places, strict=True)]
            now = self._scored(site, costs, few[some])
            if steps and float(now.min()) > bound:
                break
            number = int(some[now.argmin()])
            structure = int(few[number])
            rise = sum(
                float(state.of_sets(own[number, None])) for state, own in zip(losses, places, strict=True)
            )
            steps.append(
                Step(site, structure, rise, int(self.sizes.freed(site).expand(len(left))[structure]))
            )
            for states in {id(losses): losses, id(deciding): deciding}.values():
                for state, own in zip(states, places, strict=True):
                    state.remove_inputs(own[number])
            there[number] = left[structure] = False
            changed |= self.sizes.remove(site, structure)
            if self.units is not self.sizes:
                self.units.remove(site, structure)
        self._remove(site, [step.structure for step in steps], changed)
        return steps

    def _least_of_others(self, site: str) -> float:
        return min(
            (float(score.min()) for name, score in self.scores.items() if name != site), default=math.inf
        )

    def _remove(self, site: str, structures: list[int], changed: set[str]) -> None:
        """Take structures out of the layers that read them; score anew what changes with that, or has changed."""
        for part in self.reads[site]:
            for states in filter(None, (self.losses, self.evidences)):
                states[part.path].remove_inputs(part.places[structures].flatten())
        paths = {part.path for part in self.reads[site]}
        for other in {other: None for path in paths for other in self.readers[path]}:
            for number, part in enumerate(self.reads[other]):
                if part.path in paths:
                    self.costs[other][number] = self._cost(other, part)
            changed.add(other)
        for other in changed:
            self._score(other)

    def _cost(self, site: str, part: Part) -> Tensor:
        """What each structure that is left costs in one layer; 0 of the others."""
        left = self.left[site]
        states = self.losses if self.evidences is None else self.evidences
        found = states[part.path].of_sets(part.places[left]).cpu().double()
        return torch.zeros(len(left), dtype=torch.float64).masked_scatter(left, found)

    def _score(self, site: str) -> None:
        left = self.left[site]
        score = self._scored(site, self.costs[site], torch.arange(len(left)))
        above = int(left.sum()) > self.floors[site]
        self.scores[site] = (
            score.masked_fill(~left, torch.inf) if above else torch.full_like(score, torch.inf)
        )

    def _scored(self, site: str, costs: Sequence[Tensor], which: Tensor) -> Tensor:
        """What decides: of some structures of a group, of which these are the costs in each layer that reads them."""
        total = torch.stack([cost.cpu().double() for cost in costs]).sum(0)
        if self.order.by == "evidence":
            total = total - self.brought[site][which]
        if self.order.per is None:
            return total
        return total / self.units.freed(site).expand(len(self.left[site]))[which].clamp(min=1)
