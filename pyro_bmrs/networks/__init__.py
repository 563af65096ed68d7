"""Networks: the noise layer, the structures that can be removed, and their removal."""

from pyro_bmrs.networks.centring import centred
from pyro_bmrs.networks.export import export_onnx
from pyro_bmrs.networks.hooked_noise import network_of, without_noise
from pyro_bmrs.networks.insertion import insert_noise, structures
from pyro_bmrs.networks.noise import MultiplicativeNoise, name_sites, noise_layers
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.structures import StructureError, check_weights
from pyro_bmrs.networks.surgery import EqualityError

__all__ = [
    "EqualityError", "InputSelection", "MultiplicativeNoise", "StructureError", "centred", "check_weights",
    "export_onnx", "insert_noise", "name_sites", "network_of", "noise_layers", "structures", "without_noise",
]  # fmt: skip
