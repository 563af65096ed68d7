"""Figures. Matplotlib is loaded when one is drawn."""

from pyro_bmrs.figures.evidence_plots import plot_evidence_curve, plot_models, plot_reductions
from pyro_bmrs.figures.plots import plot_compression_curve, plot_history, plot_scores, plot_structures
from pyro_bmrs.figures.posterior_plots import (
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_reliability,
    plot_risk_coverage,
    plot_runs,
    plot_widths,
)

__all__ = [
    "plot_compression_curve", "plot_criteria", "plot_entropy", "plot_evidence_curve", "plot_forest", "plot_history",
    "plot_models", "plot_reductions", "plot_reliability", "plot_risk_coverage", "plot_runs", "plot_scores",
    "plot_structures", "plot_widths",
]  # fmt: skip
