"""Networks: the noise layer, what is tied to it, and removing it for real."""

from pyro_bmrs.networks.noise import MultiplicativeNoise, name_sites, without_noise

__all__ = ["MultiplicativeNoise", "name_sites", "without_noise"]
