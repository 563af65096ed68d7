"""The log-uniform distribution: the prior of a structure's θ."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TransformedDistribution, Uniform
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_bmrs.distributions.support import broadcast, check_bounds, exponential_interval, slack


class LogUniform(TransformedDistribution):  # type: ignore[misc]  # Pyro is untyped
    """θ with log θ ~ Uniform[log_low, log_high].

    >>> import torch
    >>> p = LogUniform(-20.0, 0.0, validate_args=False)
    >>> log_prob = p.log_prob(torch.tensor([1.0, 2.0]))  # 1/(θ L) at the closed upper bound; -inf beyond
    >>> [round(value, 4) for value in log_prob.tolist()]
    [-2.9957, -inf]

    Args:
        log_low, log_high: bounds of log θ. Shape: batch.

    The density is 1/(θ L) on the closed interval [e^log_low, e^log_high], L = log_high - log_low
    (Wright et al., 2024, section 2). It has the slack of one float32 rounding, as `TruncatedLogNormal`.

    Raises:
        ValueError: if log_low ≥ log_high or a bound is not finite.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True
    base_dist: Uniform

    def __init__(
        self,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        *,
        validate_args: bool | None = None,
    ) -> None:
        validate = self._validate_args if validate_args is None else validate_args
        check_bounds(log_low, log_high, ("log_low", "log_high"), validate=validate)
        low, high = broadcast(log_low=log_low, log_high=log_high)
        # the base's own check would refuse the closed upper bound
        super().__init__(Uniform(low, high, validate_args=False), ExpTransform(), validate_args=validate_args)

    @property
    def log_low(self) -> Tensor:
        low: Tensor = self.base_dist.low
        return low

    @property
    def log_high(self) -> Tensor:
        high: Tensor = self.base_dist.high
        return high

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return exponential_interval(self.log_low, self.log_high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogUniform:
        new = self._get_checked_instance(LogUniform, _instance)
        expanded: LogUniform = super().expand(batch_shape, _instance=new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        """-log θ - log L, in nats; -inf outside the interval."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.log()
        width = slack(self.log_low, self.log_high)
        inside = (x >= self.log_low - width) & (x <= self.log_high + width)
        x = torch.where(inside, x, 0.5 * (self.log_low + self.log_high))
        return torch.where(inside, -x - torch.log(self.log_high - self.log_low), float("-inf"))

    def cdf(self, value: Tensor) -> Tensor:
        """P(θ ≤ value); 0 below the support and 1 above it."""
        x = value.clamp(min=0.0).log()
        return ((x - self.log_low) / (self.log_high - self.log_low)).clamp(0.0, 1.0)

    @property
    def snr(self) -> Tensor:
        """E[θ] / sqrt(Var θ), dimensionless. Shape: batch."""
        return self.mean / self.variance.sqrt()

    @property
    def mean(self) -> Tensor:
        """(e^log_high - e^log_low) / L."""
        length = self.log_high - self.log_low
        return self.log_high.exp() * -torch.expm1(-length) / length

    @property
    def variance(self) -> Tensor:
        length = self.log_high - self.log_low
        second = (2 * self.log_high).exp() * -torch.expm1(-2 * length) / (2 * length)
        return second - self.mean**2

    def entropy(self) -> Tensor:
        """log L + E[log θ], in nats."""
        return torch.log(self.log_high - self.log_low) + 0.5 * (self.log_low + self.log_high)
