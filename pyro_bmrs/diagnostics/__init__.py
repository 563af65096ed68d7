"""What was believed, what was removed, and what it cost: checks, draws for ArviZ, figures and reports.

Importing this loads no plotting library and no ArviZ; the functions do, when called.
"""

from pyro_bmrs.diagnostics.arviz_io import load_datatree, loo, save_datatree, to_datatree
from pyro_bmrs.diagnostics.calibration import Predictions, predictions, quality, reliability, risk_coverage
from pyro_bmrs.diagnostics.curve import compression_curve
from pyro_bmrs.diagnostics.diagnosis import Diagnosis, criterion_curves, diagnose
from pyro_bmrs.diagnostics.evidence_plots import plot_evidence_curve, plot_models, plot_reductions
from pyro_bmrs.diagnostics.plots import plot_compression_curve, plot_history, plot_scores, plot_structures
from pyro_bmrs.diagnostics.posterior_checks import PosteriorChecks, check_posterior
from pyro_bmrs.diagnostics.posterior_plots import (
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_reliability,
    plot_risk_coverage,
    plot_runs,
    plot_widths,
)

# Imported now, not on demand: the function has its module's name, and a later import would bind the module.
from pyro_bmrs.diagnostics.report import report
from pyro_bmrs.diagnostics.what_if import what_if

__all__ = [
    "Diagnosis",
    "PosteriorChecks",
    "Predictions",
    "check_posterior",
    "compression_curve",
    "criterion_curves",
    "diagnose",
    "load_datatree",
    "loo",
    "plot_compression_curve",
    "plot_criteria",
    "plot_entropy",
    "plot_evidence_curve",
    "plot_forest",
    "plot_history",
    "plot_models",
    "plot_reductions",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_runs",
    "plot_scores",
    "plot_structures",
    "plot_widths",
    "predictions",
    "quality",
    "reliability",
    "report",
    "risk_coverage",
    "save_datatree",
    "to_datatree",
    "what_if",
]
