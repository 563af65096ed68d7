"""A normal distribution restricted to a closed interval, for Pyro."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Uniform, constraints, register_kl

from pyro_bmrs.distributions import tail_arithmetic
from pyro_bmrs.distributions.support import (
    ClosedInterval,
    broadcast,
    check_bounds,
    slack,
    without_expansion,
)


class TruncatedNormal(TorchDistribution):  # type: ignore[misc]  # Pyro is untyped
    """x ~ Normal(loc, scale²) restricted to [low, high].

    >>> import torch
    >>> q = TruncatedNormal(torch.tensor([-3.0, -40.0]), torch.tensor([0.3, 1.0]), -20.0, 0.0)
    >>> [round(value, 3) for value in q.log_mass().tolist()]  # in nats; the literal formula Φ(β) - Φ(α) gives -inf
    [-0.0, -203.917]

    Args:
        loc: mean before truncation; any real number, also outside [low, high]. Shape: batch.
        scale: standard deviation before truncation, positive. Broadcasts with `loc`.
        low, high: bounds, finite, low < high. They are constants: no gradient flows to them.

    The density is φ((x - loc)/scale) / (scale · Z), Z = Φ((high - loc)/scale) - Φ((low - loc)/scale),
    and zero outside (log_prob is -inf). A value that one rounding to float32 has pushed past a bound
    counts as lying on it. All arithmetic is in float64; results have the dtype of `loc`.
    `rsample` has implicit reparameterisation gradients (Figurnov et al., 2018).

    Raises:
        ValueError: if low ≥ high, a bound is not finite, or (with validation) scale is not positive.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = True

    loc: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        check_bounds(low, high, ("low", "high"), validate=validate)
        self.loc, self.scale, self.low, self.high = broadcast(loc=loc, scale=scale, low=low, high=high)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def _parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.loc, self.scale, self.low, self.high

    @property
    def _compact(self) -> tuple[Tensor, ...]:
        return without_expansion(*self._parameters)

    def _returned(self, value: Tensor) -> Tensor:
        return value.to(self.loc.dtype).expand(self.batch_shape)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        width = slack(self.low, self.high)
        return ClosedInterval(self.low, self.high, width, width)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedNormal:
        new: TruncatedNormal = self._get_checked_instance(TruncatedNormal, _instance)
        for name in ("loc", "scale", "low", "high"):
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(TruncatedNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_mass(self) -> Tensor:
        """log Z in nats. Shape: batch."""
        return self._returned(tail_arithmetic.log_mass(*self._compact))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats; -inf outside [low, high]."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.to(self.loc.dtype) if not value.is_floating_point() else value
        width = slack(self.low, self.high)
        inside = (value >= self.low - width) & (value <= self.high + width)
        clamped = torch.minimum(torch.maximum(value, self.low), self.high)
        clamped = torch.where(inside, clamped, 0.5 * (self.low + self.high))
        density = tail_arithmetic.log_density(clamped, *self._compact).to(self.loc.dtype)
        return torch.where(inside, density, float("-inf"))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape sample_shape + batch, differentiable in loc and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
        # `rand` rounds down, to 0 once in 2²⁴ float32 draws. That would give the bound, however far in the tail
        return self.icdf(uniform.clamp(min=0.5 * torch.finfo(uniform.dtype).eps))

    def icdf(self, probability: Tensor) -> Tensor:
        """The quantile, always in [low, high]; differentiable in loc and scale at fixed probability."""
        return tail_arithmetic.quantile(probability, *self._compact).to(self.loc.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X ≤ value)."""
        clamped = torch.minimum(torch.maximum(value, self.low), self.high)
        return tail_arithmetic.cumulative(clamped, *self._compact).to(self.loc.dtype)

    @property
    def mean(self) -> Tensor:
        return self._returned(tail_arithmetic.mean(*self._compact))

    @property
    def variance(self) -> Tensor:
        return self._returned(tail_arithmetic.variance(*self._compact))

    @property
    def snr(self) -> Tensor:
        """E[x] / sqrt(Var x), dimensionless, of either sign. Shape: batch."""
        return self.mean / self.variance.sqrt()

    def entropy(self) -> Tensor:
        """Differential entropy in nats. Shape: batch."""
        return self._returned(tail_arithmetic.entropy(*self._compact))


@register_kl(TruncatedNormal, Uniform)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_truncated_normal_uniform(p: TruncatedNormal, q: Uniform) -> Tensor:
    """log L - entropy(p), in nats; inf where p reaches outside q's interval."""
    low, high, p_low, p_high = without_expansion(
        *(t.expand(p.batch_shape) for t in (q.low, q.high, p.low, p.high))
    )
    value = torch.log((high - low).double()) - tail_arithmetic.entropy(*p._compact)
    value = torch.where((p_low < low) | (p_high > high), float("inf"), value)
    return value.to(p.loc.dtype).expand(p.batch_shape)


@register_kl(TruncatedNormal, TruncatedNormal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_truncated_normal_truncated_normal(p: TruncatedNormal, q: TruncatedNormal) -> Tensor:
    """-entropy(p) - E_p[log q], in nats; E_p[(x - loc_q)²] comes from p's moments about q's near bound."""
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)  # type: ignore[no-untyped-call]
    loc, scale, low, high = (t.double() for t in p.expand(shape)._compact)
    q_loc, q_scale, q_low, q_high = (t.double() for t in q.expand(shape)._compact)
    anchor = torch.minimum(torch.maximum(q_loc, q_low), q_high).detach()
    distance = tail_arithmetic.squared_distance(anchor, loc, scale, low, high)
    excess = tail_arithmetic.mean_from(anchor, loc, scale, low, high)
    # (x - loc_q)² - (anchor - loc_q)² = (x - anchor)² + 2 (x - anchor)(anchor - loc_q)
    quadratic = (distance + 2 * excess * (anchor - q_loc)) / (2 * q_scale**2)
    normaliser = tail_arithmetic.log_integral_from(anchor - q_loc, q_loc, q_scale, q_low, q_high)
    value = quadratic + normaliser - tail_arithmetic.entropy(loc, scale, low, high)
    value = torch.where((low < q_low) | (high > q_high), float("inf"), value)
    return value.to(p.loc.dtype).expand(shape)
