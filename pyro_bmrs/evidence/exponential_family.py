"""ΔF where posterior, prior and reduced prior belong to one exponential family.

With densities h(θ) exp(η·T(θ) - A(η)) the product q p̃/p has natural parameter η_q + η_p̃ - η_p, and

    ΔF = A(η_q + η_p̃ - η_p) - A(η_q) - A(η_p̃) + A(η_p).

This is the only file that uses torch's private `_natural_params` and `_log_normalizer`. torch computes them
outside the parameter space too (the log-gamma of a negative number is a number), so it is checked first that the
product is a density. Normals are in `normal.py`: their A is a square of the mean, which cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    ExponentialFamily,
    Gamma,
    OneHotCategorical,
    Poisson,
    Uniform,
    Wishart,
)
from torch.nn.functional import logsigmoid

from pyro_bmrs.evidence.log_evidence_change import register_log_evidence_change, register_reduced_posterior


def _wishart(scale: Tensor, degrees: Tensor) -> Wishart:
    return Wishart(degrees * 2 + scale.shape[-1] + 1, precision_matrix=-2 * scale, validate_args=False)


# By family: the distribution with given natural parameters, in torch's order.
_FROM_NATURAL: dict[type[ExponentialFamily], Callable[..., ExponentialFamily]] = {
    Beta: lambda first, second: dist.Beta(first, second, validate_args=False),
    ContinuousBernoulli: lambda logits: dist.ContinuousBernoulli(logits=logits, validate_args=False),
    Dirichlet: lambda concentration: dist.Dirichlet(concentration, validate_args=False),
    Exponential: lambda negative_rate: dist.Exponential(-negative_rate, validate_args=False),
    Gamma: lambda shape, negative_rate: dist.Gamma(shape + 1, -negative_rate, validate_args=False),
    Poisson: lambda log_rate: dist.Poisson(log_rate.exp(), validate_args=False),
    Wishart: _wishart,
}


def _wishart_domain(scale: Tensor, degrees: Tensor) -> dict[str, tuple[Tensor, float]]:
    smallest = torch.linalg.eigvalsh(-2 * scale)[..., 0]
    dimension = scale.shape[-1]
    return {
        "smallest eigenvalue of the precision": (smallest, 0.0),
        "df": (2 * degrees + dimension + 1, dimension - 1.0),
    }


# By family: name of a quantity, its value, and the number it must exceed for the density to have an integral.
_DOMAIN: dict[type[ExponentialFamily], Callable[..., dict[str, tuple[Tensor, float]]]] = {
    Beta: lambda first, second: {"concentration1": (first, 0.0), "concentration0": (second, 0.0)},
    Dirichlet: lambda concentration: {"concentration": (concentration, 0.0)},
    Exponential: lambda negative_rate: {"rate": (-negative_rate, 0.0)},
    Gamma: lambda shape, negative_rate: {"concentration": (shape + 1, 0.0), "rate": (-negative_rate, 0.0)},
    Wishart: _wishart_domain,
}


def _as_gamma(member: Any) -> Gamma:
    if isinstance(member, Gamma):
        return member
    return Gamma(torch.ones_like(member.rate), member.rate, validate_args=False)


def _as_beta(member: Any) -> Beta:
    if isinstance(member, Beta):
        return member
    if not member.low.is_meta and not bool(((member.low == 0) & (member.high == 1)).all()):
        raise NotImplementedError(
            "no closed form for a Uniform beside a Beta, but that on [0, 1], which is Beta(1, 1): got "
            f"[{member.low}, {member.high}]"
        )
    ones = torch.ones_like(member.low)
    return Beta(ones, ones, validate_args=False)


def _natural(family: type, member: Any) -> tuple[Tensor, ...]:
    if family is ContinuousBernoulli:
        return (member.logits,)
    return member._natural_params  # type: ignore[no-any-return]


def _product(family: type[ExponentialFamily], q: Any, p: Any, reduced: Any) -> tuple[Tensor, ...]:
    """Natural parameters of the distribution proportional to q p̃/p.

    Raises:
        ValueError: if they lie outside the family's parameter space.
    """
    of_q, of_p, of_reduced = (_natural(family, member) for member in (q, p, reduced))
    # in this order the sum is exactly η_q where p̃ is p
    eta = tuple(
        q_part + (r_part - p_part) for q_part, p_part, r_part in zip(of_q, of_p, of_reduced, strict=True)
    )
    if eta[0].is_meta or family not in _DOMAIN:
        return eta
    for name, (value, least) in _DOMAIN[family](*eta).items():
        if not bool((value > least).all()):
            raise ValueError(
                f"posterior · reduced_prior / prior has no finite integral: as a {family.__name__} it would have "
                f"{name} {float(value.min()):.6g}, and that must be above {least:g}. The posterior must be narrower "
                "than its prior where the reduced prior is wider"
            )
    return eta


def _change(family: type[ExponentialFamily], q: Any, p: Any, reduced: Any) -> Tensor:
    of_product: Tensor = q._log_normalizer(*_product(family, q, p, reduced))
    of_q, of_p, of_reduced = (member._log_normalizer(*_natural(family, member)) for member in (q, p, reduced))
    change: Tensor = (of_product - of_q) - (of_reduced - of_p)
    return change


def _register(
    family: type[ExponentialFamily],
    kinds: tuple[type[Distribution], ...],
    convert: Callable[[Any], Any] = lambda member: member,
) -> None:
    """Register the rules of one family, whose distributions may be of several types."""
    for types in product((family,), kinds, kinds):

        @register_log_evidence_change(*types)
        def change(q: Any, p: Any, reduced: Any) -> Tensor:
            return _change(family, *map(convert, (q, p, reduced)))

        @register_reduced_posterior(*types)
        def posterior(q: Any, p: Any, reduced: Any) -> Distribution:
            result: Distribution = _FROM_NATURAL[family](*_product(family, *map(convert, (q, p, reduced))))
            return result


for _family in (ContinuousBernoulli, Dirichlet, Exponential, Poisson, Wishart):
    _register(_family, (_family,))
_register(Gamma, (Gamma, Exponential), _as_gamma)
_register(Beta, (Beta, Uniform), _as_beta)


# --- finite supports: the sum itself --------------------------------------------------------------------


def _log_probabilities(member: Any) -> Tensor:
    """Normalised log-probability of each value, along the last dimension."""
    # for a probability of 0 torch has the logits of a small one
    if isinstance(member, Bernoulli):
        if "probs" in vars(member):
            return torch.stack([torch.log1p(-member.probs), member.probs.log()], -1)
        return torch.stack([logsigmoid(-member.logits), logsigmoid(member.logits)], -1)
    inner = member._categorical if isinstance(member, OneHotCategorical) else member
    logits: Tensor = inner.probs.log() if "probs" in vars(inner) else inner.logits
    return logits.log_softmax(-1)


def _log_weights(q: Any, p: Any, reduced: Any) -> Tensor:
    of_q, of_p, of_reduced = map(_log_probabilities, (q, p, reduced))
    counts = [member.shape[-1] for member in (of_q, of_p, of_reduced)]
    if len(set(counts)) > 1:
        raise ValueError(f"the three must have the same number of values: got {counts}")
    if not of_q.is_meta:
        for name, of_outer in (("prior", of_p), ("posterior", of_q)):
            if bool(((of_outer == -math.inf) & (of_reduced > -math.inf)).any()):
                raise ValueError(f"reduced_prior must lie within the support of the {name}")
    # a value that p̃ excludes has no weight; -inf - -inf would be NaN
    return torch.where(of_reduced == -math.inf, -math.inf, of_q + (of_reduced - of_p))


for _kind in (Bernoulli, Categorical, OneHotCategorical):

    @register_log_evidence_change(_kind, _kind, _kind)
    def _finite_change(q: Any, p: Any, reduced: Any) -> Tensor:
        return _log_weights(q, p, reduced).logsumexp(-1)

    @register_reduced_posterior(_kind, _kind, _kind)
    def _finite_posterior(q: Any, p: Any, reduced: Any) -> Distribution:
        weights = _log_weights(q, p, reduced)
        result: Distribution
        if isinstance(q, Bernoulli):
            result = dist.Bernoulli(logits=weights[..., 1] - weights[..., 0], validate_args=False)
        elif isinstance(q, OneHotCategorical):
            result = dist.OneHotCategorical(logits=weights, validate_args=False)
        else:
            result = dist.Categorical(logits=weights, validate_args=False)
        return result
