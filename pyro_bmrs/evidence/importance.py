"""ΔF from draws, where there is no closed form: Pareto-smoothed importance weights, and how reliable they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.arguments import whole_number
from pyro_bmrs.evidence.unwrapping import (
    batch_shape_of,
    check_distributions,
    device_of,
    in_float64,
    log_density,
    unwrapped,
)

DRAWS = 4000
# With fewer draws neither the size of a tail nor the error of a mean can be estimated.
LEAST_CARRYING = 50
LEAST_DRAWS = 100
# Share of the total weight that the carrying draws hold.
CARRIED = 0.99
# Weights whose relative difference is at most this are equal: the rest is rounding.
EQUAL = 1e-8
# Weights that have a bound make no tail if the logarithms of the largest, half of what a tail would be, differ by less.
FLAT = 0.05


class ImportanceError(ArithmeticError):
    """ΔF can't be estimated from these draws: too few of them lie where the reduced prior is."""


class UnreliableEstimateWarning(UserWarning):
    """An estimate of ΔF is not reliable: its weights have too heavy a tail, or the model itself says something else."""


@dataclass(frozen=True)
class ImportanceEstimate:
    """An estimate of ΔF = log E_q[p̃/p] from draws, and its reliability. All tensors: float64, batch shape.

    Attributes:
        estimate: ΔF in nats, from Pareto-smoothed weights (Vehtari et al., 2024).
        standard_error: of `estimate`, in nats: the relative standard error of the mean weight.
        khat: shape of the generalised Pareto distribution of the largest weights; -inf, the best value, where all
            weights are equal, for example if the reduced prior is the prior.
        effective_sample_size: 1/Σw² of the normalised weights, in draws.
        carrying_draws: the smallest number of draws that hold 99 % of the weight.
        draws: number S of draws.
        log_weights: normalised and smoothed; -inf for draws without weight. Shape: (draws, *batch).
    """

    estimate: Tensor
    standard_error: Tensor
    khat: Tensor
    effective_sample_size: Tensor
    carrying_draws: Tensor
    draws: int
    log_weights: Tensor

    @property
    def khat_threshold(self) -> float:
        """min(1 - 1/log10 S, 0.7). An estimate with a larger k̂ is not reliable (Vehtari et al., 2024)."""
        return khat_threshold(self.draws)

    @property
    def reliable(self) -> Tensor:
        """Whether k̂ is at most the threshold. Bool, batch shape."""
        return self.khat <= self.khat_threshold


def khat_threshold(draws: int) -> float:
    """min(1 - 1/log10 S, 0.7), the largest k̂ of a reliable estimate from S draws.

    >>> khat_threshold(100), khat_threshold(4000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def estimate_log_mean(log_weights: Tensor, control: Tensor | None = None) -> ImportanceEstimate:
    """Log of the mean of weights, given their logarithms, with Pareto-smoothed tails.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(4000, dtype=torch.float64)  # E[exp(x)] = e^½
    >>> found = estimate_log_mean(x)
    >>> abs(float(found.estimate) - 0.5) < 3 * float(found.standard_error) < 0.1
    True

    Args:
        log_weights: in nats. Shape: (draws, *batch).
        control: a quantity of mean 0 at the same draws, of weights that have a bound: what the weights and it share is
            no error of the mean. Same shape.

    Warns:
        UnreliableEstimateWarning: if k̂ is above min(1 - 1/log10 S, 0.7).

    Raises:
        ImportanceError: if fewer than 50 draws hold 99 % of the weight.
        ValueError: for a log-weight that is NaN or +inf, or fewer than 100 draws.
    """
    draws = log_weights.shape[0]
    if draws < LEAST_DRAWS:
        raise ValueError(f"draws must be at least {LEAST_DRAWS}: got {draws}")
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError("log_weights must be finite or -inf: got NaN or inf")
    flat = log_weights.detach().double().reshape(draws, -1)
    carrying = _carrying(flat)
    least = int(carrying.min())
    if least < LEAST_CARRYING:
        where = torch.nonzero(carrying < LEAST_CARRYING).flatten().tolist()
        of = "" if flat.shape[1] == 1 else f" of elements {where[:10]}"
        raise ImportanceError(
            f"only {least} of {draws} draws carry weight{of}, fewer than {LEAST_CARRYING}: the reduced "
            "prior lies where the posterior has hardly any mass, or is far narrower. A spike can't be estimated from "
            "draws: as a point mass (pyro.distributions.Delta) it has a closed form"
        )
    bounded = control is not None
    columns = [_smoothed(*column, bounded) for column in zip(flat.unbind(-1), carrying.tolist(), strict=True)]
    smoothed = torch.stack([weights for weights, _ in columns], -1)
    total = smoothed.logsumexp(0)
    normalised = smoothed - total
    batch = log_weights.shape[1:]
    mean, error = _mean(draws * normalised.exp(), None if control is None else control.reshape(draws, -1))
    khat = torch.tensor([khat for _, khat in columns], dtype=torch.float64, device=flat.device)
    result = ImportanceEstimate(
        estimate=(total - math.log(draws) + mean.log()).reshape(batch),
        standard_error=error.reshape(batch),
        khat=torch.where(error <= EQUAL, -math.inf, khat).reshape(batch),
        effective_sample_size=(-(2 * normalised).logsumexp(0)).exp().reshape(batch),
        carrying_draws=carrying.reshape(batch),
        draws=draws,
        log_weights=normalised.reshape(log_weights.shape),
    )
    if not bool(result.reliable.all()):
        warnings.warn(
            f"Pareto k̂ is {float(result.khat.max()):.2f}, above {result.khat_threshold:.2f}: the estimate of ΔF "
            f"({float(result.estimate.flatten()[int(result.khat.argmax())]):.3g} nats) is not reliable; the "
            "reduced prior is too far from the posterior",
            UnreliableEstimateWarning,
            stacklevel=2,
        )
    return result


def _mean(weights: Tensor, control: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean of weights whose sample mean is 1, its relative standard error). Shape: (draws, batch) → (batch,)."""
    draws = len(weights)
    mean, rest = torch.ones_like(weights[0]), weights - 1
    if control is not None:
        away = control - control.mean(0)
        slope = (away * rest).sum(0) / away.square().sum(0).clamp(min=EQUAL)
        corrected = 1 - slope * control.mean(0)
        good = corrected > 0
        mean, rest = torch.where(good, corrected, mean), torch.where(good, rest - slope * away, rest)
    return mean, rest.square().mean(0).sqrt() / draws**0.5 / mean


def _carrying(log_weights: Tensor) -> Tensor:
    """The smallest number of draws that hold 99 % of the weight. Shape: (draws, batch) → (batch,)."""
    ordered = log_weights.softmax(0).nan_to_num(0.0).sort(0, descending=True).values
    carrying = (ordered.cumsum(0) < CARRIED * (1 - EQUAL)).sum(0) + 1
    return torch.where((log_weights > -math.inf).any(0), carrying, 0)


def _smoothed(log_weights: Tensor, carrying: int, bounded: bool) -> tuple[Tensor, float]:
    """Log-weights whose largest are replaced by quantiles of a generalised Pareto distribution, and its shape k̂.

    The distribution is fitted to the largest min(S/5, 3 √S) weights. If at most twice as many draws carry weight,
    most of these weights are nearly 0 and the fit is wrong about the others. Then the weights stay unsmoothed. So do
    weights that have a bound; where they reach it there is no tail.
    """
    positive = log_weights > -math.inf
    values = log_weights[positive]
    tail = min(len(values) / 5, 3 * len(values) ** 0.5)
    if bounded and float(values.max() - values.topk(math.ceil(tail / 2)).values[-1]) <= FLAT:
        return log_weights, -math.inf
    smoothed, khat = _pareto(values)
    if smoothed is None:
        return log_weights, khat
    if bounded or carrying <= 2 * tail:
        return log_weights, float(khat)
    lowest = values.argmin()  # not in the tail: only the normalisation changes it
    result = log_weights.clone()
    result[positive] = smoothed + (values[lowest] - smoothed[lowest])
    return result, float(khat)


def pareto_khat(log_weights: Tensor) -> float:
    """k̂ of importance weights: the shape of the generalised Pareto distribution of the largest min(S/5, 3√S).

    >>> pareto_khat(torch.zeros(1000))  # all weights equal: the draws come from the target itself
    -inf

    Args:
        log_weights: in nats; -inf for draws without weight. Shape: (draws,).

    Returns:
        k̂. Up to `khat_threshold(draws)` the draws can represent the target. -inf: all weights are
        equal. inf: they are too unequal to fit a Pareto distribution.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling" (2024); for variational
    posteriors Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?" (2018).

    Raises:
        ValueError: for a log-weight that is NaN or +inf, or fewer than 100 draws.
    """
    if log_weights.dim() != 1 or len(log_weights) < LEAST_DRAWS:
        raise ValueError(
            f"log_weights must be of at least {LEAST_DRAWS} draws: got shape {tuple(log_weights.shape)}"
        )
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError("log_weights must be finite or -inf: got NaN or inf")
    weights = log_weights.detach().double()
    carrying = int(_carrying(weights.unsqueeze(-1)))
    positive = weights[weights > -math.inf]
    with np.errstate(all="ignore"):  # weights may underflow
        khat = _pareto(positive)[1] if len(positive) >= LEAST_CARRYING else math.inf
    # if all weights but a few underflow, the tail looks flat or light
    return math.inf if carrying < LEAST_CARRYING and khat <= khat_threshold(len(weights)) else khat


def _pareto(log_weights: Tensor) -> tuple[Tensor | None, float]:
    """Smoothed and normalised log-weights from finite ones, and their k̂; None and -inf if there is no tail."""
    from arviz_stats.base import array_stats

    if float(log_weights.max() - log_weights.min()) <= EQUAL:
        return None, -math.inf
    try:
        # ArviZ takes the negative log-weights and returns normalised ones
        given, khat = array_stats.psislw(-log_weights.cpu().numpy())
    except ValueError as error:
        if "same" not in str(error):
            raise
        return None, -math.inf  # the largest weights are all equal: there is no tail
    if math.isnan(khat):  # discrete distributions: the largest weights have only a few values
        return None, -math.inf
    return torch.as_tensor(given).to(log_weights), float(khat)


def estimate_log_evidence_change(
    posterior: Distribution,
    prior: Distribution,
    reduced_prior: Distribution,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> ImportanceEstimate:
    """ΔF = log E_q[p̃(θ)/p(θ)] in nats, estimated from draws of posterior and reduced prior, for any three densities.

    >>> from torch.distributions import Laplace, Normal
    >>> found = estimate_log_evidence_change(Normal(1.0, 0.3), Laplace(0.0, 1.0), Normal(0.0, 1.0))
    >>> round(float(found.estimate), 2), float(found.khat) < 0.5
    (0.23, True)

    Args:
        posterior, prior, reduced_prior: as in `log_evidence_change`. Each element is estimated separately.
        draws: number S of draws, at least 100: one half of the posterior, one of the reduced prior.
        seed: of the draws; torch's own generator is unchanged.

    Raises:
        ImportanceError: if fewer than 50 draws carry weight. A point can't be estimated this way.
        ValueError: if draws of the reduced prior lie outside the support of posterior or prior. Then the draws
            miss a part of the expectation.
    """
    draws, seed = whole_number("draws", draws, LEAST_DRAWS), whole_number("seed", seed)
    check_distributions((posterior, prior, reduced_prior))
    wide = (in_float64(posterior), in_float64(prior), in_float64(reduced_prior))
    # masked elements don't count; each element is drawn
    triple, wrappings = unwrapped(*wide, stop=lambda found: True)
    shape = batch_shape_of(triple)
    q, p, reduced = (member.expand(shape) for member in triple)
    device = device_of(q)
    with torch.no_grad(), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        check_support(q, p, reduced)

        def of_elements(density: Tensor) -> Tensor:
            for wrapping in reversed(wrappings):
                density = wrapping.of_change(density, 1)
            return density

        return half_and_half(q, p, reduced, draws, of_elements).estimate()


@dataclass(frozen=True)
class HalfAndHalf:
    """Draws, one half of the posterior and one of the reduced prior, and what they weigh. See `half_and_half`.

    Attributes:
        values: Shape: (draws, *batch, *event).
        log_weights: Shape: (draws, *batch).
        control: a quantity of mean 0. Shape: (draws, *batch).
    """

    values: Tensor
    log_weights: Tensor
    control: Tensor

    def estimate(self) -> ImportanceEstimate:
        """ΔF."""
        return estimate_log_mean(self.log_weights, self.control)


def half_and_half(
    posterior: Any,
    prior: Any,
    reduced_prior: Any,
    draws: int,
    of_elements: Callable[[Tensor], Tensor] = lambda density: density,
) -> HalfAndHalf:
    """Draws of m = ½ q + ½ p̃, with weights q p̃ / (p m), whose mean is e^ΔF, and q/m − 1, whose mean is 0.

    A weight is at most 2 min(p̃/p, q/p). Draws of q alone have weights p̃/p, of which no variance is finite where p̃ has
    heavier tails than p: they then miss what counts, and k̂ does not tell. Less its regression on q/m − 1 the mean
    weight is exact where p̃ is p, and where q is p: the data say nothing.

    Source: Owen and Zhou, "Safe and effective importance sampling" (2000).

    Args:
        of_elements: from log-densities of entries to those of elements.
    """
    theta = torch.cat([posterior.sample((draws - draws // 2,)), reduced_prior.sample((draws // 2,))])
    of_q, of_p, of_reduced = (
        of_elements(log_density(member, theta)) for member in (posterior, prior, reduced_prior)
    )
    of_mixture = torch.logaddexp(of_q, of_reduced) - math.log(2)
    outside = (of_q == -math.inf) | (of_reduced == -math.inf)
    log_weights = torch.where(outside, -math.inf, of_q + of_reduced - of_p - of_mixture)
    return HalfAndHalf(theta, log_weights, (of_q - of_mixture).expm1())


def log_ratio(prior: Distribution, reduced_prior: Distribution, theta: Tensor) -> Tensor:
    """log p̃(θ) - log p(θ), in nats; -inf where p̃ has no mass."""
    of_reduced = log_density(reduced_prior, theta)
    return torch.where(of_reduced == -math.inf, -math.inf, of_reduced - log_density(prior, theta))


def check_support(posterior: Any, prior: Any, reduced_prior: Any, *, draws: int = 1000) -> None:
    """Raise ValueError if draws of the reduced prior lie where posterior or prior have no density."""
    try:
        theta = reduced_prior.sample((draws,))
    except NotImplementedError:
        raise ValueError(f"reduced_prior must be a law that can be drawn from: got {reduced_prior}") from None
    for name, member in (("posterior", posterior), ("prior", prior)):
        outside = float((log_density(member, theta) == -math.inf).double().mean())
        if outside:
            raise ValueError(
                f"reduced_prior must lie within the support of the {name}: {100 * outside:.3g} % of it is outside"
            )
