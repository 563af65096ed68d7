"""Fitting: the loop that learns weights and posterior, removes what the evidence removes, and survives."""

from pyro_bmrs.fitting.fit import Fit, fit

__all__ = ["Fit", "fit"]
