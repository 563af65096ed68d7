"""Inference: likelihoods, guides, the ELBO of a batch, and the fit."""

from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.fit import Fit, fit
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.likelihoods import Classifier, Regressor
from pyro_bmrs.inference.recalibrate import recalibrate

__all__ = [
    "AutoTruncatedLogNormal", "Classifier", "Evaluation", "Fit", "Regressor", "evaluate", "fit", "recalibrate",
]  # fmt: skip
