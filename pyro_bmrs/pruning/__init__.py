"""Pruning: from the posterior of a network's structures to a plan of what stays."""

from pyro_bmrs.pruning.criteria import (
    BMRS_N,
    BMRS_U,
    SNR,
    Criterion,
    EvidenceCriterion,
    ExpectedScale,
    Random,
    WeightNorm,
)
from pyro_bmrs.pruning.plan import Reduction
from pyro_bmrs.pruning.reduce import NonFiniteScoreError

__all__ = [
    "BMRS_N", "BMRS_U", "SNR", "Criterion", "EvidenceCriterion", "ExpectedScale", "NonFiniteScoreError", "Random",
    "Reduction", "WeightNorm",
]  # fmt: skip
