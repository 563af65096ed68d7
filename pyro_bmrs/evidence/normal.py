"""ΔF of normals, in one or more dimensions with any covariance, from differences of means.

E_q[p̃/p] = E_p̃[q/p]. Let x = loc_p̃ + L z, with p̃'s covariance L Lᵀ and z standard normal, and let D be the
difference Λ_q - Λ_p of the precisions. Then

    M = I + Lᵀ D L,    z* = -M⁻¹ Lᵀ (Λ_q (loc_p̃ - loc_q) - Λ_p (loc_p̃ - loc_p)),    x* = loc_p̃ + L z*,
    ΔF = ½ log|Σ_p| - ½ log|Σ_q| - ½ log|M| - ½ Q,
    Q = (x* - loc_q)ᵀ Λ_q (x* - loc_q) + z*ᵀ z* - (x* - loc_p)ᵀ Λ_p (x* - loc_p),

where x* is the mean of the reduced posterior and L M⁻¹ Lᵀ its covariance. Means appear only in differences, so no
digits are lost if all means are large. p̃'s covariance appears only as L, so p̃ may be a point in any direction:
L = 0 gives the Savage-Dickey density ratio. With full covariances this is the reduction of Friston & Penny (2011,
eq. 7).
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import Delta, ExpandedDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    HalfNormal,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from pyro_bmrs.evidence.log_evidence_change import register_log_evidence_change, register_reduced_posterior
from pyro_bmrs.evidence.point_mass import savage_dickey

_WIDER = (
    "posterior · reduced_prior / prior has no finite integral: the posterior must be narrower than its prior "
    "where the reduced prior is wider (1/scale² of the posterior plus that of reduced_prior must exceed the "
    "prior's)"
)


class NormalChange(NamedTuple):
    """ΔF in nats, and mean and standard deviation of the reduced posterior. Shapes: batch."""

    log_evidence_change: Tensor
    loc: Tensor
    scale: Tensor


def normal_change(
    q_loc: Tensor, q_scale: Tensor, p_loc: Tensor, p_scale: Tensor, reduced_loc: Tensor, reduced_scale: Tensor
) -> NormalChange:
    """The formula above in one dimension. All arguments broadcast; reduced_scale may be 0.

    Raises:
        ValueError: if the product of the three has no finite integral.
    """
    to_q, to_p, between = reduced_loc - q_loc, reduced_loc - p_loc, p_loc - q_loc
    narrowing = (p_scale - q_scale) * (p_scale + q_scale)
    spread = 1 + (reduced_scale / q_scale) ** 2 * (narrowing / p_scale**2)
    if not spread.is_meta and not bool((spread > 0).all()):
        raise ValueError(_WIDER)
    # (to_q/q² - to_p/p²) and the difference of squares below, without cancellation where q is nearly p
    gradient = between / q_scale**2 + to_p * narrowing / (q_scale * p_scale) ** 2
    z = -reduced_scale * gradient / spread
    step = reduced_scale * z
    from_q, from_p = (to_q + step) / q_scale, (to_p + step) / p_scale
    difference = (between + (to_p + step) * ((p_scale - q_scale) / p_scale)) / q_scale
    quadratic = difference * (from_q + from_p) + z * z
    change = torch.log(p_scale / q_scale) - 0.5 * torch.log(spread) - 0.5 * quadratic
    return NormalChange(change, reduced_loc + step, reduced_scale * spread.rsqrt())


class MultivariateChange(NamedTuple):
    """ΔF in nats (batch), and the mean (batch, n) and covariance (batch, n, n) of the reduced posterior."""

    log_evidence_change: Tensor
    loc: Tensor
    covariance: Tensor


def multivariate_change(
    q_loc: Tensor,
    q_covariance: Tensor,
    p_loc: Tensor,
    p_covariance: Tensor,
    reduced_loc: Tensor,
    reduced_factor: Tensor,
) -> MultivariateChange:
    """The formula above in n dimensions. Batches broadcast.

    Args:
        q_loc, p_loc, reduced_loc: means. Shape: (batch, n).
        q_covariance, p_covariance: positive definite. Shape: (batch, n, n).
        reduced_factor: L of the reduced prior's covariance L Lᵀ; rows of zeros where it is a point.
            Shape: (batch, n, n).

    Raises:
        ValueError: if the product of the three has no finite integral.
    """
    n = q_loc.shape[-1]
    eye = torch.eye(n, dtype=q_loc.dtype, device=q_loc.device)
    q_factor, p_factor = cholesky("posterior", q_covariance), cholesky("prior", p_covariance)
    q_precision, p_precision = torch.cholesky_inverse(q_factor), torch.cholesky_inverse(p_factor)
    narrowing = q_precision - p_precision
    spread = eye + reduced_factor.mT @ narrowing @ reduced_factor
    spread_factor, failed = torch.linalg.cholesky_ex(spread)
    if not failed.is_meta and bool(failed.any()):
        raise ValueError(_WIDER)
    between, to_p = p_loc - q_loc, reduced_loc - p_loc
    gradient = _times(q_precision, between) + _times(narrowing, to_p)
    pulled = _times(reduced_factor.mT, gradient)
    z = -torch.cholesky_solve(pulled.unsqueeze(-1), spread_factor).squeeze(-1)
    step = _times(reduced_factor, z)
    from_p = to_p + step
    quadratic = (
        (from_p * _times(narrowing, from_p)).sum(-1)
        + ((2 * from_p + between) * _times(q_precision, between)).sum(-1)
        + (z * z).sum(-1)
    )
    change = (
        _half_log_det(p_factor) - _half_log_det(q_factor) - _half_log_det(spread_factor) - 0.5 * quadratic
    )
    root = torch.linalg.solve_triangular(spread_factor, reduced_factor.mT, upper=False)
    return MultivariateChange(change, reduced_loc + step, root.mT @ root)


def cholesky(name: str, covariance: Tensor) -> Tensor:
    """The Cholesky factor of a covariance; ValueError if there is none."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed.is_meta and bool(failed.any()):
        raise ValueError(
            f"{name} must have a positive definite covariance: it has none, to the precision of float64"
        )
    return factor


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _half_log_det(factor: Tensor) -> Tensor:
    """½ log of the determinant of the matrix with this Cholesky factor."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


# --- the rules ----------------------------------------------------------------------------------------


def _loc_scale(member: Any) -> tuple[Tensor, Tensor]:
    if isinstance(member, Delta):
        return member.v, torch.zeros_like(member.v)
    if isinstance(member, HalfNormal):
        return torch.zeros_like(member.scale), member.scale
    return member.loc, member.scale


def _of_triple(q: Any, p: Any, reduced: Any) -> NormalChange:
    return normal_change(*_loc_scale(q), *_loc_scale(p), *_loc_scale(reduced))


for _reduced in (Normal, Delta):

    @register_log_evidence_change(Normal, Normal, _reduced)
    def _normal(q: Normal, p: Normal, reduced: Any) -> Tensor:
        return _of_triple(q, p, reduced).log_evidence_change


@register_reduced_posterior(Normal, Normal, Normal)
def _normal_posterior(q: Normal, p: Normal, reduced: Normal) -> Distribution:
    _, loc, scale = _of_triple(q, p, reduced)
    result: Distribution = dist.Normal(loc, scale, validate_args=False)
    return result


# half-normals are normals around zero, folded: ΔF is the same
@register_log_evidence_change(HalfNormal, HalfNormal, HalfNormal)
def _half_normal(q: HalfNormal, p: HalfNormal, reduced: HalfNormal) -> Tensor:
    return _of_triple(q, p, reduced).log_evidence_change


@register_reduced_posterior(HalfNormal, HalfNormal, HalfNormal)
def _half_normal_posterior(q: HalfNormal, p: HalfNormal, reduced: HalfNormal) -> Distribution:
    result: Distribution = dist.HalfNormal(_of_triple(q, p, reduced).scale, validate_args=False)
    return result


def normal_of_vectors(member: Any) -> tuple[Tensor, Tensor] | None:
    """(mean (batch, n), factor of the covariance (batch, n, n)) of a normal or point over vectors; None for others."""
    if isinstance(member, Delta) and len(member.event_shape) == 1:
        return member.v, torch.zeros(
            *member.v.shape, member.v.shape[-1], dtype=member.v.dtype, device=member.v.device
        )
    if isinstance(member, MultivariateNormal | LowRankMultivariateNormal):
        return member.loc, member.scale_tril
    if isinstance(member, Independent) and member.reinterpreted_batch_ndims == 1:
        base = member.base_dist
        while isinstance(base, ExpandedDistribution | Independent):
            base = base.base_dist
        if isinstance(base, Normal):
            loc = base.loc.expand(member.batch_shape + member.event_shape)
            return loc, torch.diag_embed(base.scale.expand(loc.shape))
    return None


def _of_vectors(q: Any, p: Any, reduced: Any) -> MultivariateChange:
    (q_loc, q_factor), (p_loc, p_factor), (loc, factor) = (
        _required(name, member)
        for name, member in (("posterior", q), ("prior", p), ("reduced_prior", reduced))
    )
    return multivariate_change(q_loc, q_factor @ q_factor.mT, p_loc, p_factor @ p_factor.mT, loc, factor)


def _required(name: str, member: Any) -> tuple[Tensor, Tensor]:
    found = normal_of_vectors(member)
    if found is None:
        raise NotImplementedError(
            f"no closed form: {name} must be a normal of vectors beside a multivariate normal: got {member}"
        )
    return found


_VECTORS = (MultivariateNormal, LowRankMultivariateNormal, Independent)
for _types in product(_VECTORS, _VECTORS, (*_VECTORS, Delta)):
    if not {MultivariateNormal, LowRankMultivariateNormal} & set(_types):
        continue  # all are independent: these are unwrapped

    @register_log_evidence_change(*_types)
    def _multivariate(q: Any, p: Any, reduced: Any) -> Tensor:
        try:
            return _of_vectors(q, p, reduced).log_evidence_change
        except NotImplementedError:
            if not isinstance(reduced, Delta):
                raise
            return savage_dickey(q, p, reduced)

    if _types[2] is not Delta:

        @register_reduced_posterior(*_types)
        def _multivariate_posterior(q: Any, p: Any, reduced: Any) -> Distribution:
            _, loc, covariance = _of_vectors(q, p, reduced)
            result: Distribution = dist.MultivariateNormal(
                loc, covariance_matrix=covariance, validate_args=False
            )
            return result
