"""Distributions of θ, and the tail arithmetic that they use."""

from pyro_bmrs.distributions.log_uniform import LogUniform
from pyro_bmrs.distributions.truncated_log_normal import TruncatedLogNormal
from pyro_bmrs.distributions.truncated_normal import TruncatedNormal

__all__ = ["LogUniform", "TruncatedLogNormal", "TruncatedNormal"]
