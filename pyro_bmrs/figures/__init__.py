"""Figures. Matplotlib is loaded when one is drawn."""

from pyro_bmrs.figures.curves import plot_compression_curve, plot_criteria
from pyro_bmrs.figures.evidence import plot_evidence_curve, plot_models, plot_reductions
from pyro_bmrs.figures.forest import plot_forest
from pyro_bmrs.figures.frontier import plot_frontier
from pyro_bmrs.figures.history import plot_history
from pyro_bmrs.figures.predictions import plot_entropy, plot_reliability, plot_risk_coverage
from pyro_bmrs.figures.removal_path import plot_removal_path
from pyro_bmrs.figures.runs import plot_runs
from pyro_bmrs.figures.scores import plot_scores
from pyro_bmrs.figures.structures import plot_structures
from pyro_bmrs.figures.widths import plot_widths

__all__ = [
    "plot_compression_curve", "plot_criteria", "plot_entropy", "plot_evidence_curve", "plot_forest", "plot_frontier",
    "plot_history", "plot_models", "plot_reductions", "plot_reliability", "plot_removal_path", "plot_risk_coverage",
    "plot_runs", "plot_scores", "plot_structures", "plot_widths",
]  # fmt: skip
