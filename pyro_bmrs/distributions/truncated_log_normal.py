"""The truncated log-normal distribution: the posterior of a structure's θ."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_bmrs.distributions import tail_arithmetic
from pyro_bmrs.distributions.support import check_bounds, exponential_interval
from pyro_bmrs.distributions.truncated_normal import TruncatedNormal


class TruncatedLogNormal(TransformedDistribution):  # type: ignore[misc]  # Pyro is untyped
    """θ with log θ ~ Normal(loc, scale²) restricted to [log_low, log_high].

    >>> import torch
    >>> q = TruncatedLogNormal(torch.tensor([-0.5, -15.0]), torch.tensor([0.02, 2.0]))
    >>> [round(value, 4) for value in q.mean.tolist()]
    [0.6067, 0.0]
    >>> q.rsample((3,)).shape
    torch.Size([3, 2])

    Args:
        loc, scale: of log θ before truncation; scale > 0. Shape: batch.
        log_low, log_high: bounds of log θ, by default -20 and 0 as in the paper: θ is in [2.1e-9, 1].

    Formulas (Wright et al., 2024, section 2; Neklyudov et al., 2017), with α, β the bounds in standard deviations
    from loc and Z the mass between them:
    E[θᵏ] = exp(k loc + k² scale²/2) [Φ(β - k scale) - Φ(α - k scale)]/Z and SNR = E[θ]/sqrt(Var θ).
    KL against `LogUniform` is log L - log scale - log Z - ½ log 2πe - (α φ(α) - β φ(β))/2Z,
    L = log_high - log_low. KL and gradients are exact far into both tails.

    Raises:
        ValueError: if log_low ≥ log_high, a bound is not finite, or (with validation) scale ≤ 0.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = True
    base_dist: TruncatedNormal

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        check_bounds(log_low, log_high, ("log_low", "log_high"), validate=validate)
        base = TruncatedNormal(loc, scale, log_low, log_high, validate_args=validate_args)
        super().__init__(base, ExpTransform(), validate_args=validate_args)

    @property
    def loc(self) -> Tensor:
        return self.base_dist.loc

    @property
    def scale(self) -> Tensor:
        return self.base_dist.scale

    @property
    def log_low(self) -> Tensor:
        return self.base_dist.low

    @property
    def log_high(self) -> Tensor:
        return self.base_dist.high

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return exponential_interval(self.log_low, self.log_high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedLogNormal:
        new = self._get_checked_instance(TruncatedLogNormal, _instance)
        expanded: TruncatedLogNormal = super().expand(batch_shape, _instance=new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of θ in nats; -inf outside the interval, zero and negative numbers included."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.log()
        density = self.base_dist.log_prob(x)
        # outside the interval the Jacobian may be infinite
        return torch.where(torch.isneginf(density), density, density - x)

    def log_mean(self) -> Tensor:
        """log E[θ] in nats. Shape: batch."""
        value = tail_arithmetic.log_exponential_moment(1, *self.base_dist._compact)
        return self.base_dist._returned(value)

    @property
    def mean(self) -> Tensor:
        value = tail_arithmetic.log_exponential_moment(1, *self.base_dist._compact).exp()
        return self.base_dist._returned(value)

    @property
    def variance(self) -> Tensor:
        parameters = self.base_dist._compact
        ratio = tail_arithmetic.squared_coefficient_of_variation(*parameters)
        mean = tail_arithmetic.log_exponential_moment(1, *parameters).exp()
        return self.base_dist._returned(ratio * mean * mean)

    @property
    def snr(self) -> Tensor:
        """E[θ] / sqrt(Var θ), dimensionless. Shape: batch."""
        ratio = tail_arithmetic.squared_coefficient_of_variation(*self.base_dist._compact)
        return self.base_dist._returned(torch.rsqrt(ratio))

    def cdf(self, value: Tensor) -> Tensor:
        """P(θ ≤ value); 0 below the support and 1 above it."""
        return self.base_dist.cdf(value.clamp(min=0.0).log())

    def entropy(self) -> Tensor:
        """Differential entropy of θ in nats: that of log θ plus E[log θ]."""
        parameters = self.base_dist._compact
        return self.base_dist._returned(
            tail_arithmetic.entropy(*parameters) + tail_arithmetic.mean(*parameters)
        )
