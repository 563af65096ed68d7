"""The change in log-evidence under a reduced prior, dispatched on three types as KL is on two."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

Rule = Callable[..., Tensor]
_RULES: dict[tuple[type, type, type], Rule] = {}


def register_log_evidence_change(
    posterior: type[Distribution], prior: type[Distribution], reduced_prior: type[Distribution]
) -> Callable[[Rule], Rule]:
    """Decorator: the rule for a triple of types and their subclasses; the closest types win."""

    def decorate(rule: Rule) -> Rule:
        _RULES[posterior, prior, reduced_prior] = rule
        return rule

    return decorate


def _find_rule(types: tuple[type, type, type]) -> Rule | None:
    lineages = [kind.__mro__ for kind in types]
    matches = [key for key in product(*lineages) if key in _RULES]
    if not matches:
        return None
    distance = {
        key: sum(line.index(kind) for line, kind in zip(lineages, key, strict=True)) for key in matches
    }
    return _RULES[min(matches, key=lambda key: distance[key])]


def log_evidence_change(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Tensor:
    """ΔF = log p̃(y) - log p(y) = log E_q[ p̃(θ)/p(θ) ], in nats.

    >>> import torch
    >>> from pyro_bmrs import LogUniform, TruncatedLogNormal
    >>> q = TruncatedLogNormal(torch.tensor([-0.5, -25.0]), torch.tensor([0.1, 2.0]))
    >>> spike = TruncatedLogNormal(-20.0, 1e-6)
    >>> log_evidence_change(q, LogUniform(), spike).round(decimals=3).tolist()
    [-19008.118, 3.34]

    Args:
        posterior: q(θ), the posterior that was fitted under `prior`.
        prior: p(θ), the prior it was fitted under.
        reduced_prior: p̃(θ), the prior of the reduced model. All three broadcast.

    Returns:
        ΔF in float64, of the posterior's batch shape. Positive: the reduced model has the higher
        evidence, as far as q is the posterior (Wright et al., 2024, eq. 5; Friston & Penny, 2011).

    Raises:
        NotImplementedError: for a triple of types without a closed form; it names the three.
        ValueError: where the reduced prior has mass outside the prior's or the posterior's support.
    """
    distributions = (posterior, prior, reduced_prior)
    if isinstance(posterior, Independent):
        dims = posterior.reinterpreted_batch_ndims
        bases = []
        for name, member in zip(("posterior", "prior", "reduced_prior"), distributions, strict=True):
            if not isinstance(member, Independent) or member.reinterpreted_batch_ndims != dims:
                raise ValueError(
                    f"{name} must be an Independent over {dims} dimensions like the posterior: got {member}"
                )
            bases.append(member.base_dist)
        change = log_evidence_change(*bases)
        return change.sum(dim=list(range(-dims, 0))) if dims else change
    rule = _find_rule((type(posterior), type(prior), type(reduced_prior)))
    if rule is None:
        names = ", ".join(type(member).__name__ for member in distributions)
        known = "; ".join(sorted(", ".join(kind.__name__ for kind in key) for key in _RULES))
        raise NotImplementedError(
            f"no closed form for (posterior, prior, reduced_prior) of types ({names}); "
            f"there is one for: {known}"
        )
    shape = torch.broadcast_shapes(*(d.batch_shape for d in distributions))  # type: ignore[no-untyped-call]
    return rule(*distributions).expand(shape)
