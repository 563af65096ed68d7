"""Groups of coordinates of a joint normal posterior, reduced one after another or in every combination.

With independent priors, ΔF of several groups is a sum in any order of them,

    ΔF(g₁, g₂, …) = ΔF(g₁) + ΔF(g₂ | g₁) + …,

where each term needs only the marginal of its own group under the posterior reduced so far. The other
coordinates x_r follow a reduced group x_g by the regression K = Σ_rg Σ_gg⁻¹:

    loc_r + K (loc'_g - loc_g),    Σ_rr - K (Σ_gg - Σ'_gg) Kᵀ.

A group that is kept is marginalised out: its rows and columns are dropped. So 2ⁿ models are the leaves of a tree
whose matrices shrink on the way down. At nearly all of its nodes they are single numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_bmrs.evidence.normal import MultivariateChange, cholesky, multivariate_change, normal_change

# Largest number of float64 values that a node of the tree may need at once, for its matrices and their copies.
_BUDGET = 2**24
_COPIES = 6


@dataclass(frozen=True)
class GroupReduction:
    """The prior and the reduced prior of a group of n coordinates.

    Attributes:
        coordinates: indices into the joint normal; the other attributes have the same order. Shape: (n,).
        reduced_loc: mean of the reduced prior. Shape: (n,).
        reduced_factor: L of the reduced prior's covariance L Lᵀ; zero for a point. Shape: (n, n).
        prior_loc, prior_covariance: of the prior. Shape: (n,) and (n, n). None if the prior is not normal; then the
            reduced prior is a point.
        log_prior_density: of the prior at that point, in nats; given if the prior is not normal.
    """

    coordinates: Tensor
    reduced_loc: Tensor
    reduced_factor: Tensor
    prior_loc: Tensor | None = None
    prior_covariance: Tensor | None = None
    log_prior_density: Tensor | None = None

    def at(self, coordinates: Tensor) -> GroupReduction:
        """The same group at other indices."""
        return replace(self, coordinates=coordinates)

    def change(self, loc: Tensor, covariance: Tensor) -> MultivariateChange:
        """ΔF and the reduced posterior, for posteriors of these coordinates. Shapes: (batch, n), (batch, n, n)."""
        if self.prior_loc is None or self.prior_covariance is None:
            assert self.log_prior_density is not None
            factor = cholesky("posterior", covariance)
            away = (self.reduced_loc - loc).unsqueeze(-1)
            z = torch.linalg.solve_triangular(factor, away, upper=False).squeeze(-1)
            half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            normaliser = 0.5 * loc.shape[-1] * torch.log(torch.tensor(2 * torch.pi, dtype=loc.dtype)).to(loc)
            density = -0.5 * z.square().sum(-1) - half_log_det - normaliser
            point = self.reduced_loc.expand_as(loc)
            return MultivariateChange(density - self.log_prior_density, point, torch.zeros_like(covariance))
        if len(self.coordinates) == 1:  # a million of these take less than a second
            found = normal_change(
                loc[..., 0], covariance[..., 0, 0].sqrt(),
                self.prior_loc[0], self.prior_covariance[0, 0].sqrt(),
                self.reduced_loc[0], self.reduced_factor[0, 0].abs(),
            )  # fmt: skip
            return MultivariateChange(
                found.log_evidence_change, found.loc.unsqueeze(-1), found.scale.square()[..., None, None]
            )
        return multivariate_change(
            loc, covariance, self.prior_loc, self.prior_covariance, self.reduced_loc, self.reduced_factor
        )


@dataclass(frozen=True)
class Chain:
    """Two groups, one after the other: points where priors are not normal, and then normals.

    Attributes:
        first, second: the groups.
    """

    first: GroupReduction
    second: GroupReduction

    @property
    def coordinates(self) -> Tensor:
        """Of both, the first ones first."""
        return torch.cat([self.first.coordinates, self.second.coordinates])

    def at(self, coordinates: Tensor) -> Chain:
        """As `GroupReduction.at`."""
        count = len(self.first.coordinates)
        return Chain(self.first.at(coordinates[:count]), self.second.at(coordinates[count:]))

    def change(self, loc: Tensor, covariance: Tensor) -> MultivariateChange:
        """As `GroupReduction.change`."""
        _, (first, second) = by_themselves([self.first, self.second])
        change, loc, covariance = reduce_group(loc, covariance, first)
        further, loc, covariance = reduce_group(loc, covariance, second)
        return MultivariateChange(change + further, loc, covariance)


type Group = GroupReduction | Chain


def as_one(groups: Sequence[GroupReduction]) -> Group:
    """Several groups as one."""
    if any(group.log_prior_density is not None for group in groups):
        points: list[GroupReduction] = []
        spread: list[GroupReduction] = []
        for group in groups:
            (spread if bool((group.reduced_factor != 0).any()) else points).append(group)
        if spread:
            return Chain(_as_one(points), _as_one(spread))
    return _as_one(groups)


def _as_one(groups: Sequence[GroupReduction]) -> GroupReduction:
    coordinates = torch.cat([group.coordinates for group in groups])
    loc = torch.cat([group.reduced_loc for group in groups])
    factor = torch.block_diag(*(group.reduced_factor for group in groups))  # type: ignore[no-untyped-call]
    if any(group.log_prior_density is not None for group in groups):
        groups = [_as_density(group) for group in groups]
    densities = [group.log_prior_density for group in groups if group.log_prior_density is not None]
    if not densities:
        prior_loc = torch.cat([group.prior_loc for group in groups if group.prior_loc is not None])
        covariances = [group.prior_covariance for group in groups if group.prior_covariance is not None]
        covariance = torch.block_diag(*covariances)  # type: ignore[no-untyped-call]
        return GroupReduction(coordinates, loc, factor, prior_loc, covariance)
    return GroupReduction(coordinates, loc, factor, log_prior_density=torch.stack(densities).sum(0))


def by_themselves[G: (GroupReduction, Group)](groups: Sequence[G]) -> tuple[Tensor, list[G]]:
    """(coordinates of all groups, the groups with indices into these coordinates)."""
    coordinates = torch.cat([group.coordinates for group in groups])
    numbers = torch.arange(len(coordinates), device=coordinates.device)
    own = numbers.tensor_split(torch.tensor([len(group.coordinates) for group in groups]).cumsum(0)[:-1])
    return coordinates, [g.at(o) for g, o in zip(groups, own, strict=True)]


def _as_density(group: GroupReduction) -> GroupReduction:
    """The group of a point, with the prior's density there in place of the prior."""
    if group.prior_loc is None or group.prior_covariance is None:
        return group
    prior = MultivariateNormal(group.prior_loc, group.prior_covariance, validate_args=False)
    density: Tensor = prior.log_prob(group.reduced_loc)  # type: ignore[no-untyped-call]
    return replace(group, prior_loc=None, prior_covariance=None, log_prior_density=density)


def reduce_group(loc: Tensor, covariance: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """(ΔF, loc, covariance) of all coordinates after a group is reduced. Batches are allowed."""
    n = loc.shape[-1]
    others = torch.ones(n, dtype=torch.bool, device=loc.device).index_fill(0, group.coordinates, False)
    order = torch.cat([group.coordinates, torch.nonzero(others).flatten()])
    back = order.argsort()
    change, own, rest = _split(loc[..., order], covariance[..., order, :][..., order], group)
    new_loc = torch.cat([own.loc, rest.loc], -1)
    top = torch.cat([own.covariance, (rest.regression @ own.covariance).mT], -1)
    bottom = torch.cat([rest.regression @ own.covariance, rest.covariance], -1)
    new_covariance = torch.cat([top, bottom], -2)
    return change, new_loc[..., back], new_covariance[..., back, :][..., back]


@dataclass(frozen=True)
class _Rest:
    loc: Tensor
    covariance: Tensor
    regression: Tensor


def _split(loc: Tensor, covariance: Tensor, group: Group) -> tuple[Tensor, MultivariateChange, _Rest]:
    """Reduce the first coordinates. Returns ΔF, their reduced posterior, and that of the others."""
    n = len(group.coordinates)
    own_loc, own_covariance = loc[..., :n], covariance[..., :n, :n]
    found = group.change(own_loc, own_covariance)
    across = covariance[..., n:, :n]
    # a million divisions are faster than a million solutions
    regression = across / own_covariance if n == 1 else torch.linalg.solve(own_covariance, across.mT).mT
    moved = (regression @ (found.loc - own_loc).unsqueeze(-1)).squeeze(-1)
    narrowed = regression @ (own_covariance - found.covariance) @ regression.mT
    rest = _Rest(loc[..., n:] + moved, covariance[..., n:, n:] - 0.5 * (narrowed + narrowed.mT), regression)
    return found.log_evidence_change, found, rest


def all_subsets(
    loc: Tensor,
    covariance: Tensor,
    groups: Sequence[Group],
    on_models: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """ΔF in nats of each of the 2ⁿ models of n disjoint groups. Model i reduces group k if bit k of i is 1.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> spike = torch.zeros(1, 1, dtype=torch.float64)
    >>> groups = [
    ...     GroupReduction(torch.tensor([k]), spike[0], spike, spike[0], 100 * eye[:1, :1]) for k in range(2)
    ... ]
    >>> all_subsets(torch.tensor([0.0, 5.0], dtype=torch.float64), eye, groups).round(decimals=2).tolist()
    [0.0, 2.3, -10.2, -7.89]

    Args:
        loc, covariance: of the posterior, for at least the coordinates of the groups. Shapes: (d,), (d, d).
        groups: up to 30.
        on_models: called with the number of further models done.

    Returns:
        Shape: (2ⁿ,). The computation needs a few hundred MB more, for any number and size of groups.
    """
    order = torch.cat([group.coordinates for group in groups])
    result = torch.empty(2 ** len(groups), dtype=loc.dtype, device=loc.device)
    start = torch.zeros(1, dtype=torch.long, device=loc.device)
    nothing = torch.zeros(1, dtype=loc.dtype, device=loc.device)
    # a stack, not recursion: a node's matrices are freed before its children are made
    nodes = [(0, start, nothing, loc[order].unsqueeze(0), covariance[order][:, order].unsqueeze(0))]
    while nodes:
        level, models, changes, mean, spread = nodes.pop()
        if level == len(groups):
            result[models] = changes
            on_models(len(models))
            continue
        parts = -(-(spread.shape[-1] ** 2 * len(models) * _COPIES) // _BUDGET)
        if parts > 1 and len(models) > 1:
            pieces = (tensor.chunk(parts) for tensor in (models, changes, mean, spread))
            nodes += [(level, *piece) for piece in zip(*pieces, strict=True)]
            continue
        n = len(groups[level].coordinates)
        change, _, rest = _split(mean, spread, groups[level])
        nodes.append(
            (
                level + 1,
                torch.cat([models, models | 1 << level]),
                torch.cat([changes, changes + change]),
                torch.cat([mean[:, n:], rest.loc]),
                torch.cat([spread[:, n:, n:], rest.covariance]),
            )
        )
    return result
