"""Inference: likelihoods, guides, and the ELBO of a batch."""

from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Classifier, Likelihood, Regressor
from pyro_bmrs.inference.predict import predict
from pyro_bmrs.inference.recalibrate import recalibrate

__all__ = [
    "AutoKroneckerLaplace", "AutoTruncatedLogNormal", "Classifier", "Evaluation", "Likelihood", "Regressor", "evaluate",
    "predict", "recalibrate",
]  # fmt: skip
