"""In which order the structures of a trained network are removed: least rise of the loss per parameter first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_bmrs.evidence.kronecker import KroneckerCurvature
from pyro_bmrs.networks.groups import Member, StructureGroup
from pyro_bmrs.networks.matrices import columns_of, input_dim, is_matrix

# The share of the mean of A's diagonal that is added to it, so that it has an inverse.
RIDGE = 1e-3
# Matrices get smaller when fewer than this share of their inputs is left.
_DENSE = 0.75


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


class LayerLoss:
    """What the loss rises by, to second order, as inputs of a layer are removed one set after the other.

    Without inputs S the others take over what they can (Optimal Brain Surgeon, for a block):
    W ← W − W_S (A⁻¹_SS)⁻¹ A⁻¹_S·, and the loss over the data set rises by ½ N tr(G W_S (A⁻¹_SS)⁻¹ W_Sᵀ), in nats. What
    inputs cost outputs that leave too is not taken back: the sum over layers then comes nearer to what is measured.
    """

    def __init__(self, curvature: KroneckerCurvature) -> None:
        a = curvature.inputs
        scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        # an input that is always 0 would leave no inverse
        self.inverse = torch.linalg.inv(a + RIDGE * scale.clamp(min=1e-30) * eye)
        # N Wᵀ G W. Shape: (blocks, inputs, inputs)
        self.curved = torch.stack([
            curvature.examples * (weights.mT * values) @ weights for values, weights in curvature.rotated
        ])  # fmt: skip
        # which inputs stay, and where each of them stands in the matrices, which get smaller now and then
        self.left = torch.ones(a.shape[-1], dtype=torch.bool, device=a.device)
        self.place = torch.arange(a.shape[-1], device=a.device)

    def of_sets(self, sets: Tensor) -> Tensor:
        """The rise of the loss without each of these sets of inputs, alone. Shape: (sets,)."""
        sets = self.place[sets]
        if sets.shape[1] == 1:
            curved, inverse = (
                some.diagonal(dim1=-2, dim2=-1)[:, sets[:, 0]] for some in (self.curved, self.inverse)
            )
            return 0.5 * (curved / inverse).sum(0)
        curved, inverse = (
            some[:, sets.unsqueeze(-1), sets.unsqueeze(-2)] for some in (self.curved, self.inverse)
        )
        solved: Tensor = torch.linalg.solve(inverse, curved)
        return 0.5 * solved.diagonal(dim1=-2, dim2=-1).sum((0, 2))

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


@dataclass
class Sizes:
    """How many parameters each structure of some groups frees, as tensors get smaller."""

    network: nn.Module
    groups: Sequence[StructureGroup]
    shapes: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = {id(parameter) for parameter in self.network.parameters()}
        self._counts: dict[str, dict[int, dict[int, Tensor]]] = {}
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
        total: Tensor | float = 0.0
        for tensor, dims in self._counts[site].items():
            before, after = 1.0, torch.ones(())
            for dim, size in enumerate(self.shapes[tensor]):
                before *= size
                after = after * (size - dims[dim] if dim in dims else size)
            total = total + before - after
        return torch.as_tensor(total).double()

    def remove(self, site: str, structure: int) -> set[str]:
        """Take a structure away. Returns the groups whose numbers change."""
        changed: set[str] = set()
        for tensor, dims in self._counts[site].items():
            for dim, counts in dims.items():
                self.shapes[tensor][dim] -= int(counts[structure])
            changed.update(self.sharing[tensor])
        return changed


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
    *,
    per_parameter: bool = True,
) -> list[Step]:
    """Remove one structure after the other, until each group is at its floor.

    The next one is that of the least rise of the loss per parameter that it frees, summed over the layers that read it,
    taken anew in these layers as structures leave.

    Args:
        floors: by site, how many structures stay at least.
        per_parameter: False: the least rise of the loss, whatever it frees.
    """
    groups = [group for group in groups if group.site in parts]
    layers = {
        path: LayerLoss(curvatures[path])
        for path in dict.fromkeys(part.path for group in groups for part in parts[group.site].reads)
    }
    readers: dict[str, list[str]] = {}
    for group in groups:
        for part in parts[group.site].reads:
            readers.setdefault(part.path, []).append(group.site)
    sizes = Sizes(network, groups)
    left = {group.site: torch.ones(group.features, dtype=torch.bool) for group in groups}
    costs: dict[tuple[str, int], Tensor] = {}
    scores: dict[str, Tensor] = {}

    def measure(site: str) -> None:
        total = sum(
            (costs[site, number] for number in range(len(parts[site].reads))), start=torch.zeros(())
        ).double()
        freed = sizes.freed(site)
        score = total / freed.clamp(min=1) if per_parameter else total
        totals[site], frees[site] = total, freed
        score = score.masked_fill(~left[site], torch.inf)
        scores[site] = score.fill_(torch.inf) if int(left[site].sum()) <= floors[site] else score

    def cost(site: str, number: int) -> None:
        part, there = parts[site].reads[number], left[site]
        found = layers[part.path].of_sets(part.places[there]).cpu()
        costs[site, number] = torch.zeros(len(there), dtype=torch.float64).masked_scatter(
            there, found.double()
        )

    totals: dict[str, Tensor] = {}
    frees: dict[str, Tensor] = {}
    for group in groups:
        for number in range(len(parts[group.site].reads)):
            cost(group.site, number)
        measure(group.site)
    steps: list[Step] = []
    while groups:
        site = min(scores, key=lambda name: float(scores[name].min()))
        structure = int(scores[site].argmin())
        if not float(scores[site][structure]) < torch.inf:
            break
        steps.append(Step(site, structure, float(totals[site][structure]), int(frees[site][structure])))
        left[site][structure] = False
        changed = sizes.remove(site, structure)
        for part in parts[site].reads:
            layers[part.path].remove_inputs(part.places[structure])
        for path in dict.fromkeys(part.path for part in parts[site].reads):
            for other in dict.fromkeys(readers[path]):
                for number, part in enumerate(parts[other].reads):
                    if part.path == path:
                        cost(other, number)
                changed.add(other)
        for other in changed:
            measure(other)
    return steps


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
    a = curvature.inputs
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    stays = ~inputs
    own = a[:, stays][:, :, stays]
    own = own + RIDGE * scale * torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
    shared = a[:, inputs][:, :, stays]
    before = curvature.weights.flatten(1, -2)
    weights = torch.zeros_like(before)
    moved = torch.linalg.solve(own, (before[:, :, inputs] @ shared).mT).mT
    weights[:, :, stays] = before[:, :, stays] + moved
    return weights.view(curvature.weights.shape)
