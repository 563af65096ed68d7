"""ΔF of a reduced prior that is one point: the Savage-Dickey density ratio, for any two densities."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.evidence.log_evidence_change import register_log_evidence_change, register_reduced_posterior
from pyro_bmrs.evidence.unwrapping import log_density, point


@register_log_evidence_change(Distribution, Distribution, Delta)
def savage_dickey(q: Any, p: Any, reduced: Delta) -> Tensor:
    """log q(θ₀) - log p(θ₀) in nats (Dickey, 1971).

    Raises:
        ValueError: if θ₀ is outside a support, or a density at θ₀ is zero or infinite.
    """
    densities = {}
    for name, member in (("posterior", q), ("prior", p)):
        densities[name] = log_density(member, reduced.v)
        if not densities[name].is_meta and not bool(torch.isfinite(densities[name]).all()):
            raise ValueError(
                f"reduced_prior must be a point where the {name} has a positive, finite density: "
                f"at {reduced.v.flatten()[:3].tolist()} its log is {densities[name].flatten()[:3].tolist()}"
            )
    change: Tensor = densities["posterior"] - densities["prior"]
    return change


@register_reduced_posterior(Distribution, Distribution, Delta)
def _point_posterior(q: Any, p: Any, reduced: Delta) -> Distribution:
    savage_dickey(q, p, reduced)  # for its checks
    same: Distribution = point(reduced, len(reduced.event_shape))
    return same
