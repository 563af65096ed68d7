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
from pyro_bmrs.reduction.plan import Reduction
from pyro_bmrs.reduction.reduce import NonFiniteScoreError, reduce

__all__ = [
    "BMRS_N", "BMRS_U", "SNR", "Criterion", "EvidenceCriterion", "ExpectedScale", "NonFiniteScoreError",
    "Random", "Reduction", "WeightNorm", "reduce",
]  # fmt: skip
