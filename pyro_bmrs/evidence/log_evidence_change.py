"""ΔF under a reduced prior, and the posterior under it, without fitting again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.evidence.dispatch import TripleDispatch
from pyro_bmrs.evidence.unwrapping import (
    Triple,
    batch_shape_of,
    check_distributions,
    expanded_to,
    in_float64,
    unwrapped,
)

_CHANGES, _POSTERIORS = TripleDispatch(), TripleDispatch()

type Register[Result] = Callable[[Callable[..., Result]], Callable[..., Result]]


def register_log_evidence_change(
    posterior: type[Distribution], prior: type[Distribution], reduced_prior: type[Distribution]
) -> Register[Tensor]:
    """Decorator: registers the rule of ΔF for a triple of types and their subclasses; the closest types win.

    A rule gets the three distributions with float64 parameters and without wrappers
    (Independent, Masked, Expanded). It returns ΔF in nats, which broadcasts to their batch shape.
    """
    return _CHANGES.register(posterior, prior, reduced_prior)


def register_reduced_posterior(
    posterior: type[Distribution], prior: type[Distribution], reduced_prior: type[Distribution]
) -> Register[Distribution]:
    """Decorator: the same for `reduced_posterior`. The rule returns a distribution."""
    return _POSTERIORS.register(posterior, prior, reduced_prior)


def log_evidence_change(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Tensor:
    """ΔF = log p̃(y) - log p(y) = log E_q[ p̃(θ)/p(θ) ], the log Bayes factor of the reduced model, in nats.

    >>> import torch
    >>> from pyro_bmrs import LogUniform, TruncatedLogNormal
    >>> q = TruncatedLogNormal(torch.tensor([-0.5, -25.0]), torch.tensor([0.1, 2.0]))
    >>> spike = TruncatedLogNormal(-20.0, 1e-6)
    >>> log_evidence_change(q, LogUniform(), spike).round(decimals=3).tolist()
    [-19008.118, 3.34]

    There are closed forms for

    - truncated normals and log-normals under truncated or uniform priors;
    - normals and multivariate normals;
    - three distributions of one exponential family (Gamma, Beta, Dirichlet, Exponential, Poisson, Wishart, …) or
      of one finite support;
    - all of these under a common one-to-one map;
    - any posterior and prior with densities, if reduced_prior is a point mass (Pyro's `Delta`): the Savage-Dickey
      density ratio log q(θ₀) - log p(θ₀).

    Independent, Masked and Expanded distributions are unwrapped. docs/evidence.md has the derivations.

    Args:
        posterior: q(θ), fitted under `prior`.
        prior: p(θ).
        reduced_prior: p̃(θ), the prior of the reduced model. All three broadcast and have the same number of event
            dimensions.

    Returns:
        ΔF in float64, of the batch shape. If it is positive the reduced model has more evidence, as far as q is
        the exact posterior (Wright et al., 2024, eq. 5; Friston & Penny, 2011). 0 for elements that posterior or
        prior mask out.

    Raises:
        NotImplementedError: for three types without a closed form; the message names them.
            `estimate_log_evidence_change` estimates ΔF from draws.
        ValueError: if the reduced prior has mass outside the support of prior or posterior; if
            q p̃/p has no finite integral (the posterior is wider than its prior, and the reduced prior is wider
            still); if event dimensions differ.
    """
    triple, wrappings, rule = _find(_CHANGES, (posterior, prior, reduced_prior))
    change: Tensor = rule(*triple)
    change = change.expand(batch_shape_of(triple))
    for wrapping in reversed(wrappings):
        change = wrapping.of_change(change, 0)
    return change.expand(batch_shape_of((posterior, prior, reduced_prior)))


def reduced_posterior(
    posterior: Distribution, prior: Distribution, reduced_prior: Distribution
) -> Distribution:
    """q̃(θ) = q(θ) p̃(θ)/p(θ) · e^-ΔF, the posterior under the reduced prior, as a Pyro distribution.

    >>> from torch.distributions import Normal
    >>> q = reduced_posterior(Normal(1.0, 0.5), Normal(0.0, 1.0), Normal(0.0, 0.5))
    >>> round(float(q.mean), 4), round(float(q.stddev), 4)  # precision 4 - 1 + 4, mean 4 · 1 / 7
    (0.5714, 0.378)

    Args:
        posterior, prior, reduced_prior: as in `log_evidence_change`.

    Returns:
        In float64, of the common batch and event shape. If the reduced prior is a point mass, the same point mass.

    Raises:
        NotImplementedError, ValueError: as in `log_evidence_change`.
    """
    triple, wrappings, rule = _find(_POSTERIORS, (posterior, prior, reduced_prior))
    result: Any = rule(*triple)
    result = expanded_to(result, batch_shape_of(triple))
    for wrapping in reversed(wrappings):
        result = wrapping.of_distribution(result)
    return expanded_to(result, batch_shape_of((posterior, prior, reduced_prior)))


def _find(dispatch: TripleDispatch, members: Triple) -> tuple[Triple, list[Any], Callable[..., Any]]:
    check_distributions(members)
    q, p, reduced = (in_float64(member) for member in members)
    triple, wrappings = unwrapped(q, p, reduced, stop=lambda found: dispatch.find(found) is not None)
    rule = dispatch.find(triple)
    if rule is None:
        names = ", ".join(type(member).__name__ for member in triple)
        known = "; ".join(sorted(", ".join(kind.__name__ for kind in key) for key in dispatch.rules))
        raise NotImplementedError(
            f"no closed form for (posterior, prior, reduced_prior) of types ({names}); "
            f"there is one for: {known}"
        )
    return triple, wrappings, rule
