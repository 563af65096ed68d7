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
from pyro_bmrs.pruning.sizes import Sizes

# The share of the mean of A's diagonal that is added to it, so that it has an inverse.
RIDGE = 1e-3
# Matrices get smaller when fewer than this share of their inputs is left.
_DENSE = 0.75
# Outputs of a layer have at most so many different curvatures where evidence is taken anew at each step.
_LEVELS = 8


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
        per_parameter: whether both are divided by the number of parameters that it frees.

    >>> RemovalOrder(by="evidence")
    RemovalOrder(by='evidence', per_parameter=True)
    """

    by: Literal["loss", "evidence"] = "loss"
    per_parameter: bool = True

    def __post_init__(self) -> None:
        check(self.by in ("loss", "evidence"), "by", '"loss" or "evidence"', self.by)
        good = isinstance(self.per_parameter, bool)
        check(good, "per_parameter", "True or False", self.per_parameter, TypeError)


class _LayerState:
    """Inverses of matrices over a layer's inputs, and moments of its weights, as inputs are removed set by set.

    Without inputs S the others take over what they can (Optimal Brain Surgeon, for a block):
    W ← W − W_S (P⁻¹_SS)⁻¹ P⁻¹_S·, where P is any of the matrices.

    Args:
        inverse: P⁻¹. Shape: (matrices, inputs, inputs).
        curved: Σ w wᵀ over the outputs that belong to it. Shape: that of `inverse`.
    """

    def __init__(self, inverse: Tensor, curved: Tensor) -> None:
        self.inverse, self.curved = inverse, curved
        # which inputs stay, and where each of them stands in the matrices, which get smaller now and then
        self.left = torch.ones(inverse.shape[-1], dtype=torch.bool, device=inverse.device)
        self.place = torch.arange(inverse.shape[-1], device=inverse.device)

    def of_sets(self, sets: Tensor) -> Tensor:
        """What each of these sets of inputs costs, alone. Shape: (sets,)."""
        raise NotImplementedError

    def quadratic(self, sets: Tensor) -> tuple[Tensor, Tensor]:
        """tr (P⁻¹_SS)⁻¹ (Σ w wᵀ)_SS and log det P⁻¹_SS. Shapes: (matrices, sets)."""
        sets = self.place[sets]
        if sets.shape[1] == 1:
            curved, inverse = (
                some.diagonal(dim1=-2, dim2=-1)[:, sets[:, 0]] for some in (self.curved, self.inverse)
            )
            return curved / inverse, inverse.log()
        curved, inverse = (
            some[:, sets.unsqueeze(-1), sets.unsqueeze(-2)] for some in (self.curved, self.inverse)
        )
        solved: Tensor = torch.linalg.solve(inverse, curved)
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1), torch.linalg.slogdet(inverse).logabsdet

    def remove_inputs(self, inputs: Tensor) -> None:
        """Set the weights of these inputs to 0; the others take over."""
        self.left[inputs] = False
        inputs = self.place[inputs]
        rest = torch.linalg.solve(self.inverse[:, inputs][:, :, inputs], self.inverse[:, inputs])
        # W loses W_S rest
        mixed = self.curved[:, :, inputs] @ rest
        own = rest.mT @ mixed[:, inputs]
        self.curved += own - mixed - mixed.mT
        self.inverse -= self.inverse[:, :, inputs] @ rest
        for tensor in (self.curved, self.inverse):
            tensor[:, inputs] = 0
            tensor[:, :, inputs] = 0
        self.inverse[:, inputs, inputs] = 1  # so that it can still be inverted there
        stays = torch.nonzero(self.left).flatten()
        if 0 < len(stays) < _DENSE * self.inverse.shape[-1]:
            places = self.place[stays]
            self.curved = self.curved[:, places][:, :, places].contiguous()
            self.inverse = self.inverse[:, places][:, :, places].contiguous()
            self.place = torch.zeros_like(self.place).index_copy(
                0, stays, torch.arange(len(stays), device=stays.device)
            )


class LayerLoss(_LayerState):
    """What the loss rises by, to second order: ½ N tr(G W_S (A⁻¹_SS)⁻¹ W_Sᵀ) over the data set, in nats.

    What inputs cost outputs that leave too is not taken back: the sum over layers comes nearer to what is measured.
    """

    def __init__(self, curvature: KroneckerCurvature) -> None:
        curved = [
            curvature.examples * (weights.mT * values) @ weights for values, weights in curvature.rotated
        ]
        super().__init__(torch.linalg.inv(_with_ridge(curvature.inputs)), torch.stack(curved))

    def of_sets(self, sets: Tensor) -> Tensor:
        return 0.5 * self.quadratic(sets)[0].sum(0)


class LayerEvidence(_LayerState):
    """Minus the outgoing part of ΔF: ½ ŵ_SᵀΣ_SS⁻¹ŵ_S + ½ log det Σ_SS + ½ n log δ, given what is away, in nats.

    Outputs of about the same curvature, in the eigenvectors of G, share one matrix N g A + δ I.
    """

    def __init__(self, curvature: KroneckerCurvature, delta: float) -> None:
        self.delta = delta
        inverses, curved, counts = [], [], []
        for block, (values, weights) in enumerate(curvature.rotated):
            a = curvature.inputs[block]
            eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            for level, rows in _levels(values):
                inverses.append(torch.linalg.inv(curvature.examples * level * a + delta * eye))
                curved.append(weights[rows].mT @ weights[rows])
                counts.append(len(rows))
        super().__init__(torch.stack(inverses), torch.stack(curved))
        self.counts = torch.tensor(counts, dtype=torch.float64, device=curvature.inputs.device).unsqueeze(-1)

    def of_sets(self, sets: Tensor) -> Tensor:
        squares, logs = self.quadratic(sets)
        return 0.5 * (squares + self.counts * (logs + sets.shape[1] * math.log(self.delta))).sum(0)


def _levels(values: Tensor) -> list[tuple[float, Tensor]]:
    """A few values that stand for all: (geometric mean, which are near it)."""
    logs = values.clamp(min=float(values.max()) * 1e-9 + 1e-300).log()
    place = (
        ((logs - logs.min()) / ((logs.max() - logs.min()) / _LEVELS + 1e-12)).long().clamp(max=_LEVELS - 1)
    )
    rows = (torch.nonzero(place == level).flatten() for level in range(_LEVELS))
    return [(float(logs[some].mean().exp()), some) for some in rows if len(some)]


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
    progress: bool = True,
) -> list[Step]:
    """Remove one structure after the other, until each group is at its floor.

    What each costs is summed over the layers that read it, and taken anew in these layers as structures leave.

    Args:
        floors: by site, how many structures stay at least.
        order: which is the next one.
        deltas: by path of a layer, δ.
        brought: by site, the incoming part of ΔF of each structure.
        progress: show a bar, on a terminal.
    """
    groups = [group for group in groups if group.site in parts]
    paths = dict.fromkeys(part.path for group in groups for part in parts[group.site].reads)
    losses = {path: LayerLoss(curvatures[path]) for path in paths}
    states: dict[str, _LayerState] = dict(losses)
    if order.by == "evidence":
        states = {path: LayerEvidence(curvatures[path], deltas[path]) for path in paths}
    readers: dict[str, list[str]] = {}
    for group in groups:
        for part in parts[group.site].reads:
            readers.setdefault(part.path, []).append(group.site)
    sizes = Sizes(network, groups)
    left = {group.site: torch.ones(group.features, dtype=torch.bool) for group in groups}
    costs: dict[tuple[str, int], Tensor] = {}
    scores: dict[str, Tensor] = {}

    def measure(site: str) -> None:
        total = sum((costs[site, n] for n in range(len(parts[site].reads))), start=torch.zeros(())).double()
        if order.by == "evidence":
            total = total - brought[site]
        frees[site] = sizes.freed(site)
        score = total / frees[site].clamp(min=1) if order.per_parameter else total
        score = score.masked_fill(~left[site], torch.inf)
        scores[site] = score.fill_(torch.inf) if int(left[site].sum()) <= floors[site] else score

    def cost(site: str, number: int) -> None:
        part, there = parts[site].reads[number], left[site]
        found = states[part.path].of_sets(part.places[there]).cpu().double()
        costs[site, number] = torch.zeros(len(there), dtype=torch.float64).masked_scatter(there, found)

    frees: dict[str, Tensor] = {}
    for group in groups:
        for number in range(len(parts[group.site].reads)):
            cost(group.site, number)
        measure(group.site)
    steps: list[Step] = []
    count = sum(group.features - floors[group.site] for group in groups)
    with Progress("removal", count, shown=progress) as bar:
        while groups:
            site = min(scores, key=lambda name: float(scores[name].min()))
            structure = int(scores[site].argmin())
            if not float(scores[site][structure]) < torch.inf:
                break
            rise = sum(
                float(losses[part.path].of_sets(part.places[structure][None])) for part in parts[site].reads
            )
            steps.append(Step(site, structure, rise, int(frees[site][structure])))
            left[site][structure] = False
            changed = sizes.remove(site, structure)
            mine = dict.fromkeys(part.path for part in parts[site].reads)
            for part in parts[site].reads:
                for state in {id(one): one for one in (losses[part.path], states[part.path])}.values():
                    state.remove_inputs(part.places[structure])
            for path in mine:
                for other in dict.fromkeys(readers[path]):
                    for number, part in enumerate(parts[other].reads):
                        if part.path == path:
                            cost(other, number)
                    changed.add(other)
            for other in changed:
                measure(other)
            bar.advance()
    return steps


def _with_ridge(a: Tensor) -> Tensor:
    """A with a small multiple of the identity: an input that is always 0 would leave no inverse."""
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    return a + RIDGE * scale * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def reduced_weights(curvature: KroneckerCurvature, inputs: Tensor) -> Tensor:
    """The weights of a layer when these inputs are away: the others take over what they can.

    W_T̄ + W_T A_TT̄ A_T̄T̄⁻¹, with the same small ridge as the order's.

    Args:
        inputs: which are away. Shape: (inputs,), bool.

    Returns:
        Shape: that of the curvature's weights, 0 for those.
    """
    if not bool(inputs.any()):
        return curvature.weights
    stays = ~inputs
    own = _with_ridge(curvature.inputs)[:, stays][:, :, stays]
    shared = curvature.inputs[:, inputs][:, :, stays]
    before = curvature.weights.flatten(1, -2)
    weights = torch.zeros_like(before)
    moved = torch.linalg.solve(own, (before[:, :, inputs] @ shared).mT).mT
    weights[:, :, stays] = before[:, :, stays] + moved
    return weights.view(curvature.weights.shape)
