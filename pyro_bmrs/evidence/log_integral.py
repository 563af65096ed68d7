"""The log of an integral ∫ e^f(x) dx over unbounded numbers, by importance sampling from what f itself looks like.

The coordinates are in two parts. The outer ones (scales, rates, shares: what is no normal) are drawn from heavy-tailed
proposals, which a pilot round adapts. Given these, the inner ones are close to a normal for most models. They are
drawn from the normal at their mode with the curvature there, mixed with a t law of the same shape (Rue, Martino &
Chopin, 2009, integrate them out with that normal; here importance weights correct it).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_bmrs.evidence.importance import ImportanceError, UnreliableEstimateWarning, estimate_log_mean

# Of the t laws: heavy enough for the tails of most posteriors, and with a variance.
_FREEDOM = 5.0
_NEWTON_STEPS, _HALVINGS = 12, 6
# Squared length of a Newton step, in standard deviations, below which it has arrived.
_ARRIVED = 1e-3


class Proposal(Protocol):
    """A law of the outer coordinates that can be drawn and has a density."""

    def draw(self, draws: int) -> Tensor:
        """Shape: (draws, outer)."""

    def log_density(self, outer: Tensor) -> Tensor:
        """Shape: (draws, outer) → (draws,)."""


@dataclass(frozen=True)
class StudentT:
    """A multivariate t law. Shapes: (n,), (n, n) lower triangular; both may have a batch before them."""

    loc: Tensor
    factor: Tensor

    def draw(self, draws: int) -> Tensor:
        normal = torch.randn(draws, self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.factor @ (normal / _shrinkage(normal)).unsqueeze(-1)).squeeze(-1)

    def log_density(self, outer: Tensor) -> Tensor:
        away = torch.linalg.solve_triangular(self.factor, (outer - self.loc).unsqueeze(-1), upper=False)
        return _of_t(away.squeeze(-1)) - _log_det(self.factor)


def _shrinkage(like: Tensor) -> Tensor:
    """√(χ²/ν), one for each row."""
    freedom = torch.tensor(_FREEDOM, dtype=like.dtype, device=like.device)
    chi = torch.distributions.Chi2(freedom).sample(like.shape[:1])
    return (chi / freedom).sqrt().unsqueeze(-1)


def _of_t(z: Tensor) -> Tensor:
    """Log density of a standard t law of vectors."""
    n = z.shape[-1]
    constant = (
        math.lgamma(0.5 * (_FREEDOM + n))
        - math.lgamma(0.5 * _FREEDOM)
        - 0.5 * n * math.log(_FREEDOM * math.pi)
    )
    return constant - 0.5 * (_FREEDOM + n) * torch.log1p(z.square().sum(-1) / _FREEDOM)


def _of_normal(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


@dataclass(frozen=True)
class LogIntegral:
    """An estimate of log ∫ e^f in nats.

    Attributes:
        estimate, standard_error, khat: as in `ImportanceEstimate`; `reliable` as there. NaN, and not reliable, where
            hardly any draw carries weight.
        draws: of all coordinates, and their normalised log-weights. Shapes: (draws, n), (draws,).
    """

    estimate: float
    standard_error: float
    khat: float
    reliable: bool
    draws: Tensor
    log_weights: Tensor


def log_integral(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    spread: Tensor,
    outer: Tensor,
    *,
    beside: Proposal | None = None,
    draws: int = 500,
    chunk: int | None = None,
) -> LogIntegral:
    """log ∫ e^f(x) dx, with its error.

    >>> _ = torch.manual_seed(0)
    >>> f = lambda x: -x[0].exp() + 2 * x[0] - 0.5 * (x[1] / 3) ** 2
    >>> start = torch.zeros(2, dtype=torch.float64)
    >>> found = log_integral(f, start, torch.eye(1).double(), torch.tensor([True, False]))
    >>> abs(found.estimate - math.log(3 * math.sqrt(2 * math.pi))) < 4 * found.standard_error < 0.2
    True

    Args:
        log_density: f of one point, differentiable twice in the inner coordinates. Shape: (n,) → ().
        start: where to begin. Shape: (n,).
        spread: rough covariance of the outer coordinates. Shape: (outer, outer).
        outer: which coordinates are. Bool, shape: (n,).
        beside: a further proposal of the outer coordinates, for a quarter of the draws.
        draws: number of points.
        chunk: points at once; None for all.
    """
    return _Sampler(log_density, start, outer, chunk).result(spread, beside, draws)


class _Sampler:
    def __init__(
        self, log_density: Callable[[Tensor], Tensor], start: Tensor, outer: Tensor, chunk: int | None
    ) -> None:
        self.start, self.outer = start.double(), outer
        where = torch.cat([torch.nonzero(outer).flatten(), torch.nonzero(~outer).flatten()])
        self.back = where.argsort()

        def of_parts(inner: Tensor, fixed: Tensor) -> Tensor:
            value = log_density(torch.cat([fixed, inner])[self.back])
            return torch.where(value.isnan(), -math.inf, value).double()

        def mapped(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
            found: Callable[[Tensor, Tensor], Tensor] = torch.func.vmap(function, chunk_size=chunk)
            return found

        self.density = mapped(of_parts)
        self.gradient = mapped(torch.func.grad(of_parts))
        # not `hessian`: forward mode imports deprecated parts of torch
        self.hessian = mapped(torch.func.jacrev(torch.func.grad(of_parts)))

    def result(self, spread: Tensor, beside: Proposal | None, draws: int) -> LogIntegral:
        self.centre, _ = self.mode(self.start[~self.outer].unsqueeze(0), self.start[self.outer].unsqueeze(0))
        if not bool(self.outer.any()):
            log_weights, points = self.weights(self.start.new_empty(draws, 0))
            return _estimate(log_weights, points[:, self.back])
        extra = [] if beside is None else [beside]
        first = StudentT(self.start[self.outer], _root(4 * spread))
        pilot = draws // 4
        proposals: list[Proposal] = [first, *extra]
        log_weights, points = self.round(proposals, pilot)
        weights = log_weights.softmax(0)
        inside = points[:, : int(self.outer.sum())]
        mean = weights @ inside
        around = (weights.unsqueeze(-1) * (inside - mean)).mT @ (inside - mean)
        proposals = [StudentT(mean, _root(1.5 * around + 0.01 * spread)), first, *extra]
        log_weights, points = self.round(proposals, draws)
        return _estimate(log_weights, points[:, self.back])

    def round(self, proposals: list[Proposal], draws: int) -> tuple[Tensor, Tensor]:
        """Log-weights and points; the first proposal has half of the draws, if there are others."""
        shares = [1 / len(proposals)] * len(proposals)
        if len(proposals) > 1:
            shares = [0.5, *[0.5 / (len(proposals) - 1)] * (len(proposals) - 1)]
        counts = [round(share * draws) for share in shares]
        outer = torch.cat([one.draw(count) for one, count in zip(proposals, counts, strict=True)])
        mixture = torch.stack(
            [
                one.log_density(outer) + math.log(n / len(outer))
                for one, n in zip(proposals, counts, strict=True)
            ]
        ).logsumexp(0)
        log_weights, points = self.weights(outer)
        return log_weights - mixture, points

    def weights(self, outer: Tensor) -> tuple[Tensor, Tensor]:
        """f less the log density of the inner coordinates that are drawn, and the points, outer ones first."""
        if bool(self.outer.all()):
            return self.density(outer[:, :0], outer), outer
        if outer.shape[1]:
            loc, factor = self.mode(self.centre.expand(len(outer), -1), outer)
        else:
            loc, factor = self.mode(self.centre, outer[:1])
        normal = torch.randn(len(outer), loc.shape[-1], dtype=loc.dtype, device=loc.device)
        # every second one from the t law
        heavy = torch.arange(len(outer), device=loc.device).unsqueeze(-1) % 2 == 1
        z = torch.where(heavy, normal / _shrinkage(normal), normal)
        inner = loc + (factor @ z.unsqueeze(-1)).squeeze(-1)
        proposed = torch.logaddexp(_of_normal(z), _of_t(z)) - math.log(2) - _log_det(factor)
        return self.density(inner, outer) - proposed, torch.cat([outer, inner], -1)

    def mode(self, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        """Mode of the inner coordinates given the outer ones, and a factor of the covariance there, by Newton steps."""
        if not inner.shape[-1]:
            return inner, inner.new_zeros(*inner.shape, 0)
        value, covariance = self.density(inner, outer), None
        for _ in range(_NEWTON_STEPS):
            gradient = self.gradient(inner, outer).nan_to_num(0.0, 0.0, 0.0)
            # of a quadratic the first step arrives, and its curvature is that at the mode
            if covariance is not None and _largest_step(covariance, gradient) < _ARRIVED:
                break
            covariance = _inverse(-self.hessian(inner, outer))
            if _largest_step(covariance, gradient) < _ARRIVED:
                break
            step = (covariance @ gradient.unsqueeze(-1)).squeeze(-1)
            for _ in range(_HALVINGS):
                after = self.density(inner + step, outer)
                better = after >= value - 1e-9 * value.abs()
                if bool(better.all()):
                    break
                step = torch.where(better.unsqueeze(-1), step, 0.5 * step)
            inner = torch.where(better.unsqueeze(-1), inner + step, inner)
            value = torch.where(better, after, value)
        assert covariance is not None
        return inner, _root(covariance)


def _largest_step(covariance: Tensor, gradient: Tensor) -> float:
    """Squared length of the Newton step in standard deviations, the largest of all points."""
    return float((gradient * (covariance @ gradient.unsqueeze(-1)).squeeze(-1)).sum(-1).max())


def _inverse(precision: Tensor) -> Tensor:
    """The inverse of a symmetric matrix, made positive definite."""
    values, vectors = torch.linalg.eigh(0.5 * (precision + precision.mT).nan_to_num(0.0, 0.0, 0.0))
    values = values.abs().clamp(min=1e-10)
    values = torch.maximum(values, 1e-9 * values.amax(-1, keepdim=True))
    found: Tensor = (vectors / values.unsqueeze(-2)) @ vectors.mT
    return found


def _root(covariance: Tensor) -> Tensor:
    symmetric = 0.5 * (covariance + covariance.mT)
    size = symmetric.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp(min=1e-12)
    eye = torch.eye(symmetric.shape[-1], dtype=symmetric.dtype, device=symmetric.device)
    factor: Tensor = torch.linalg.cholesky(symmetric + 1e-10 * size * eye)
    return factor


def _estimate(log_weights: Tensor, draws: Tensor) -> LogIntegral:
    log_weights = torch.where(log_weights.isfinite(), log_weights, -math.inf)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableEstimateWarning)
            found = estimate_log_mean(log_weights)
    except ImportanceError:
        return LogIntegral(math.nan, math.inf, math.inf, False, draws, log_weights)
    return LogIntegral(
        float(found.estimate), float(found.standard_error), float(found.khat), bool(found.reliable), draws,
        found.log_weights,
    )  # fmt: skip
