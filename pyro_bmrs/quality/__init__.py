"""Quality: predictions before and after, and what other decisions would have cost."""

from pyro_bmrs.quality.calibration import quality, reliability, risk_coverage, temperature, tempered
from pyro_bmrs.quality.curves import compression_curve, criterion_curves
from pyro_bmrs.quality.diagnosis import Diagnosis
from pyro_bmrs.quality.examination import diagnose

# Imported now, not on demand: the function has its module's name, and a later import would bind the module.
from pyro_bmrs.quality.frontier import Frontier, frontier
from pyro_bmrs.quality.predictive import Predictions, predictions
from pyro_bmrs.quality.regression import regression_quality

__all__ = [
    "Diagnosis", "Frontier", "Predictions", "compression_curve", "criterion_curves", "diagnose", "frontier",
    "predictions", "quality", "regression_quality", "reliability", "risk_coverage",
    "temperature", "tempered",
]  # fmt: skip
