"""Checks: whether a posterior can be believed, and its draws for ArviZ, which is loaded when it is needed."""

from pyro_bmrs.checks.arviz_io import load_datatree, loo, save_datatree, to_datatree
from pyro_bmrs.checks.posterior import PosteriorChecks, check_posterior

__all__ = ["PosteriorChecks", "check_posterior", "load_datatree", "loo", "save_datatree", "to_datatree"]
