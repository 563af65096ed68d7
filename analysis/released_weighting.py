# The authors' released code weights the KL of a unit by N / (units of its layer × layers) where the ELBO has 1:
# the mean over units, then over layers, beside a mean over examples. Appended to a recipe by paper_tables.py.

import pyro

from pyro_bmrs import AutoTruncatedLogNormal, Classifier
from pyro_bmrs.networks.noise import noise_layers

EXAMPLES = 48_000  # of training


class _Weighted(pyro.poutine.messenger.Messenger):
    """Scales the density of each noise site, in model and guide alike."""

    def __init__(self, net):
        super().__init__()
        self.layers = noise_layers(net)

    def _pyro_sample(self, msg):
        layer = self.layers.get(msg["name"])
        if layer is not None:
            msg["scale"] = msg["scale"] * EXAMPLES / (layer.features * len(self.layers))


class _Model(Classifier):
    def forward(self, x, y=None):
        with _Weighted(self.net):
            return super().forward(x, y)


class _Guide(AutoTruncatedLogNormal):
    def forward(self, *args, **kwargs):
        with _Weighted(self.model.net):
            return super().forward(*args, **kwargs)


def model(network):
    return _Model(network)


def guide(model):
    return _Guide(model)
