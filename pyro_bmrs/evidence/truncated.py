"""ΔF in closed form for truncated normals and uniforms, and for their exponentials.

Each of the three densities is a bell (a flat one has zero precision) cut to an interval. So
q p̃ / p is again a bell, of precision 1/s² = 1/s_q² + 1/s_p̃² - 1/s_p², cut to the interval of p̃.
Relative to the heights at one common reference point e,

    ΔF = J_c(e) - J_q(e) - J_p̃(e) + J_p(e),    J(e) = log ∫ bell(x)/bell(e) dx,

without a quadratic beside it. Let e be the mode of the product, inside the interval of p̃. Then every J is
either of order log(scale) or as large as ΔF itself, and nothing cancels. The paper's eq. 8 is a
difference of terms near 4·10¹⁴ at its own reduced prior. For flat p this formula is eq. 8 (BMRS_N) if p̃ is
a truncated log-normal, and the interval formula of BMRS_U if p̃ is log-uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Uniform

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal, TruncatedNormal
from pyro_bmrs.distributions.tail_arithmetic import log_integral_from
from pyro_bmrs.evidence.log_evidence_change import register_log_evidence_change, register_reduced_posterior

# Bounds that differ by no more than this share of their size count as the same bound.
SAME_BOUND = 1e-6


class _Bell(NamedTuple):
    loc: Tensor
    scale: Tensor  # inf: flat
    low: Tensor
    high: Tensor

    @property
    def precision(self) -> Tensor:
        return self.scale**-2

    def log_integral(self, reference_minus_loc: Tensor) -> Tensor:
        """J(e), in nats."""
        flat = torch.isinf(self.scale)
        scale = torch.where(flat, 1.0, self.scale)
        curved = log_integral_from(reference_minus_loc, self.loc, scale, self.low, self.high)
        return torch.where(flat, torch.log(self.high - self.low), curved)


def _bell(distribution: TruncatedNormal | Uniform) -> _Bell:
    low, high = distribution.low.double(), distribution.high.double()
    if isinstance(distribution, TruncatedNormal):
        return _Bell(distribution.loc.double(), distribution.scale.double(), low, high)
    return _Bell(0.5 * (low + high), torch.full_like(low, torch.inf), low, high)


def _check_nested(inner: _Bell, outer: _Bell, outer_name: str) -> None:
    if inner.low.is_meta or outer.low.is_meta:
        return
    slack = SAME_BOUND * (outer.high - outer.low)
    if bool(((inner.low < outer.low - slack) | (inner.high > outer.high + slack)).any()):
        raise ValueError(
            f"reduced_prior must lie within the support of the {outer_name}: log θ in "
            f"[{float(inner.low.min())}, {float(inner.high.max())}] is not within "
            f"[{float(outer.low.max())}, {float(outer.high.min())}]"
        )


class _Product(NamedTuple):
    """q p̃/p: its loc minus any point, its scale, and whether q equals p, so that the product is p̃."""

    minus: Callable[[Tensor], Tensor]
    scale: Tensor
    unmoved: Tensor


def _product(q: _Bell, p: _Bell, reduced: _Bell) -> _Product:
    _check_nested(reduced, p, "prior")
    _check_nested(reduced, q, "posterior")
    weighted = ((q, q.precision), (reduced, reduced.precision), (p, -p.precision))
    # where q equals p, ΔF is 0 for every p̃, even one too wide for the product to be a bell
    unmoved = (q.loc == p.loc) & (q.scale == p.scale) & (q.low == p.low) & (q.high == p.high)
    precision = torch.where(unmoved, 1.0, q.precision + reduced.precision - p.precision)
    if not precision.is_meta and not bool((precision > 0).all()):
        raise ValueError(
            "posterior must be narrower than the prior where the reduced prior is wider: "
            "1/scale² of the posterior plus that of reduced_prior must exceed the prior's; "
            f"got a difference of {float(precision.min())}"
        )

    def minus(point: Tensor) -> Tensor:
        """Mode of the product minus `point`, from differences of locs alone."""
        pulls = [share * (bell.loc - point) for bell, share in weighted]
        return (pulls[0] + pulls[1] + pulls[2]) / precision

    return _Product(minus, precision.rsqrt(), unmoved)


@register_log_evidence_change(TruncatedNormal, Uniform, Uniform)
@register_log_evidence_change(TruncatedNormal, Uniform, TruncatedNormal)
@register_log_evidence_change(TruncatedNormal, TruncatedNormal, Uniform)
@register_log_evidence_change(TruncatedNormal, TruncatedNormal, TruncatedNormal)
def _truncated_normal(
    posterior: TruncatedNormal, prior: TruncatedNormal | Uniform, reduced_prior: TruncatedNormal | Uniform
) -> Tensor:
    q, p, reduced = _bell(posterior), _bell(prior), _bell(reduced_prior)
    combined_minus, scale, unmoved = _product(q, p, reduced)
    low_offset, high_offset = -combined_minus(reduced.low), -combined_minus(reduced.high)
    at_low, at_high = low_offset > 0, high_offset < 0

    def reference_minus(bell: _Bell) -> Tensor:
        inside = combined_minus(bell.loc)
        return torch.where(
            at_low, reduced.low - bell.loc, torch.where(at_high, reduced.high - bell.loc, inside)
        )

    zero = torch.zeros_like(scale)
    combined = _Bell(zero, scale, low_offset, high_offset)
    reference = torch.where(at_low, low_offset, torch.where(at_high, high_offset, zero))
    change = (
        combined.log_integral(reference)
        - q.log_integral(reference_minus(q))
        - reduced.log_integral(reference_minus(reduced))
        + p.log_integral(reference_minus(p))
    )
    return torch.where(unmoved, 0.0, change)


# A bell this many times wider than its interval is flat on it to the last digit.
_FLAT = 1e9


@register_reduced_posterior(TruncatedNormal, Uniform, Uniform)
@register_reduced_posterior(TruncatedNormal, Uniform, TruncatedNormal)
@register_reduced_posterior(TruncatedNormal, TruncatedNormal, Uniform)
@register_reduced_posterior(TruncatedNormal, TruncatedNormal, TruncatedNormal)
def _truncated_normal_posterior(
    posterior: TruncatedNormal, prior: TruncatedNormal | Uniform, reduced_prior: TruncatedNormal | Uniform
) -> TruncatedNormal:
    q, p, reduced = _bell(posterior), _bell(prior), _bell(reduced_prior)
    combined = _product(q, p, reduced)
    own_scale = torch.where(torch.isinf(reduced.scale), _FLAT * (reduced.high - reduced.low), reduced.scale)
    loc = torch.where(combined.unmoved, reduced.loc, q.loc + combined.minus(q.loc))
    scale = torch.where(combined.unmoved, own_scale, combined.scale)
    return TruncatedNormal(loc, scale, reduced.low, reduced.high, validate_args=False)


@register_log_evidence_change(TruncatedLogNormal, LogUniform, LogUniform)
@register_log_evidence_change(TruncatedLogNormal, LogUniform, TruncatedLogNormal)
@register_log_evidence_change(TruncatedLogNormal, TruncatedLogNormal, LogUniform)
@register_log_evidence_change(TruncatedLogNormal, TruncatedLogNormal, TruncatedLogNormal)
def _truncated_log_normal(
    posterior: TruncatedLogNormal,
    prior: TruncatedLogNormal | LogUniform,
    reduced_prior: TruncatedLogNormal | LogUniform,
) -> Tensor:
    # ΔF does not change under a common one-to-one map of θ
    return _truncated_normal(posterior.base_dist, prior.base_dist, reduced_prior.base_dist)


@register_reduced_posterior(TruncatedLogNormal, LogUniform, LogUniform)
@register_reduced_posterior(TruncatedLogNormal, LogUniform, TruncatedLogNormal)
@register_reduced_posterior(TruncatedLogNormal, TruncatedLogNormal, LogUniform)
@register_reduced_posterior(TruncatedLogNormal, TruncatedLogNormal, TruncatedLogNormal)
def _truncated_log_normal_posterior(
    posterior: TruncatedLogNormal,
    prior: TruncatedLogNormal | LogUniform,
    reduced_prior: TruncatedLogNormal | LogUniform,
) -> TruncatedLogNormal:
    of_log: Any = _truncated_normal_posterior(posterior.base_dist, prior.base_dist, reduced_prior.base_dist)
    return TruncatedLogNormal(of_log.loc, of_log.scale, of_log.low, of_log.high, validate_args=False)
