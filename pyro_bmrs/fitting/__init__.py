"""Fitting: the loop that learns weights and posterior, removes what the evidence removes, and survives."""

from pyro_bmrs.fitting.fit import Fit, fit
from pyro_bmrs.fitting.posterior_file import load_posterior, save_posterior

__all__ = ["Fit", "fit", "load_posterior", "save_posterior"]
