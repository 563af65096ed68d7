"""Small networks of a function and layers, and what is done with them."""

import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.networks import noise_layers
from pyro_bmrs.networks.noise import fixed_scales


class Calls(nn.Module):
    """A network of named layers and a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.calls = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.calls(self, x)


def relu(x):
    return torch.relu(x)


def fitted(net, x, seed=0):
    """(model, guide, plan that removes half at random) of a network with noise inserted."""
    torch.manual_seed(seed)
    model = bmrs.Classifier(bmrs.insert_noise(net, x))
    guide = bmrs.AutoTruncatedLogNormal(model)
    with torch.no_grad():
        guide(x, torch.zeros(len(x), dtype=torch.long))
    return model, guide, bmrs.reduce(model, guide, bmrs.Random(0.5, seed=seed))


def staying(net, x, **settings):
    """By module: the reason why its channels stay."""
    return {stays.path: stays.reason for stays in bmrs.structures(net, x, **settings).refused}


def at_one(net, x):
    ones = {site: torch.ones(layer.features) for site, layer in noise_layers(net).items()}
    with torch.no_grad(), fixed_scales(net, ones):
        return net(x)
