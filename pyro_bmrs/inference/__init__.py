"""Inference: likelihoods, guides, the ELBO of a batch, and the fit."""

from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.fit import Fit, fit
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.likelihoods import Classifier, Regressor

__all__ = ["AutoTruncatedLogNormal", "Classifier", "Evaluation", "Fit", "Regressor", "evaluate", "fit"]
