"""Pruning: from the posterior of a network's structures to a plan of which stay."""

from pyro_bmrs.pruning.criteria import (
    BMRS_N,
    BMRS_U,
    SNR,
    EvidenceCriterion,
    ExpectedScale,
    Random,
    WeightNorm,
)
from pyro_bmrs.pruning.laplace_plan import LaplacePlan
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import Plan
from pyro_bmrs.pruning.reduce import NonFiniteScoreError
from pyro_bmrs.pruning.removal_path import RemovalOrder
from pyro_bmrs.pruning.rule import Rule
from pyro_bmrs.pruning.scoring import Criterion, CriterionError

__all__ = [
    "BMRS_N", "BMRS_U", "SNR", "Criterion", "CriterionError", "EvidenceCriterion", "ExpectedScale", "LaplacePlan",
    "NetworkPlan",    "NonFiniteScoreError", "Plan", "Random", "RemovalOrder", "Rule", "WeightNorm",
]  # fmt: skip
