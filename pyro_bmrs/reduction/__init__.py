"""Reduction: criteria, and the plan of what stays."""

from pyro_bmrs.reduction.criteria import (
    BMRS_N,
    BMRS_U,
    SNR,
    Criterion,
    EvidenceCriterion,
    ExpectedScale,
    Random,
    WeightNorm,
)
from pyro_bmrs.reduction.evidence_curve import evidence_curve
from pyro_bmrs.reduction.latent_reduction import NonFiniteEvidenceError
from pyro_bmrs.reduction.plan import Reduction
from pyro_bmrs.reduction.reduce import NonFiniteScoreError, reduce
from pyro_bmrs.reduction.reduced_posterior import ReducedPosterior
from pyro_bmrs.reduction.search import ModelPosterior, exhaustive_reduction, greedy_reduction

__all__ = [
    "BMRS_N", "BMRS_U", "SNR", "Criterion", "EvidenceCriterion", "ExpectedScale", "ModelPosterior",
    "NonFiniteEvidenceError", "NonFiniteScoreError", "Random", "ReducedPosterior", "Reduction", "WeightNorm",
    "evidence_curve", "exhaustive_reduction", "greedy_reduction", "reduce",
]  # fmt: skip
