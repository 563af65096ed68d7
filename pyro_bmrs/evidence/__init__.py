"""ΔF, the change of a model's log-evidence under another prior, from the posterior alone."""

from pyro_bmrs.evidence import exponential_family as exponential_family
from pyro_bmrs.evidence import normal as normal
from pyro_bmrs.evidence import point_mass as point_mass
from pyro_bmrs.evidence import truncated as truncated
from pyro_bmrs.evidence.importance import (
    ImportanceError,
    ImportanceEstimate,
    estimate_log_evidence_change,
    estimate_log_mean,
)
from pyro_bmrs.evidence.log_evidence_change import (
    log_evidence_change,
    reduced_posterior,
    register_log_evidence_change,
    register_reduced_posterior,
)

__all__ = [
    "ImportanceError", "ImportanceEstimate", "estimate_log_evidence_change", "estimate_log_mean",
    "log_evidence_change", "reduced_posterior", "register_log_evidence_change", "register_reduced_posterior",
]  # fmt: skip
