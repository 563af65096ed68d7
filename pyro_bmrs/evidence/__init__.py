"""Changes in model evidence, from the posterior alone."""

from pyro_bmrs.evidence import truncated as truncated
from pyro_bmrs.evidence.log_evidence_change import log_evidence_change, register_log_evidence_change

__all__ = ["log_evidence_change", "register_log_evidence_change"]
