"""Networks: the noise layer, what can be removed and what is tied to it, and removing it for real."""

from pyro_bmrs.networks.hooked_noise import network_of, without_noise
from pyro_bmrs.networks.insertion import insert_noise, structures
from pyro_bmrs.networks.noise import MultiplicativeNoise, name_sites, noise_layers

__all__ = [
    "MultiplicativeNoise", "insert_noise", "name_sites", "network_of", "noise_layers", "structures",
    "without_noise",
]  # fmt: skip
