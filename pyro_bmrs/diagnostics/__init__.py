"""What was believed, what was removed, and what it cost: figures and reports of a run.

Importing this loads no plotting library; the functions do, when called.
"""

from pyro_bmrs.diagnostics.arviz_io import load_datatree, loo, save_datatree, to_datatree
from pyro_bmrs.diagnostics.curve import compression_curve
from pyro_bmrs.diagnostics.diagnosis import Diagnosis, criterion_curves, diagnose
from pyro_bmrs.diagnostics.evidence_plots import plot_evidence_curve, plot_models, plot_reductions
from pyro_bmrs.diagnostics.plots import plot_compression_curve, plot_history, plot_scores, plot_structures

# Imported now, not on demand: the function has its module's name, and a later import would bind the module.
from pyro_bmrs.diagnostics.report import report

__all__ = [
    "Diagnosis",
    "compression_curve",
    "criterion_curves",
    "diagnose",
    "load_datatree",
    "loo",
    "plot_compression_curve",
    "plot_evidence_curve",
    "plot_history",
    "plot_models",
    "plot_reductions",
    "plot_scores",
    "plot_structures",
    "report",
    "save_datatree",
    "to_datatree",
]
