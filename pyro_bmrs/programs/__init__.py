"""Programs: Bayesian model reduction of any Pyro program, by reduced priors of its latents."""

from pyro_bmrs.programs.evidence_curve import evidence_curve
from pyro_bmrs.programs.exhaustive import ModelPosterior, exhaustive_reduction
from pyro_bmrs.programs.greedy import greedy_reduction
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduce import reduce
from pyro_bmrs.programs.reduced_posterior import ReducedPosterior
from pyro_bmrs.programs.reduction import NonFiniteEvidenceError

__all__ = [
    "ModelPosterior", "NonFiniteEvidenceError", "ProgramPlan", "ReducedPosterior", "StructuresByPriors",
    "evidence_curve", "exhaustive_reduction",
    "greedy_reduction", "reduce",
]  # fmt: skip
