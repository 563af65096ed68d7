"""Every kind of network as a trained one: a regression of its own outputs, with the posterior of its weights."""

import pytest
import torch
from network_families import FAMILIES

import pyro_bmrs as bmrs
from pyro_bmrs.networks.inputs import call, tensors_of


def first_output(out):
    return next(tensor for tensor in tensors_of(out) if tensor.is_floating_point())


def output_of(net, x):
    with torch.no_grad():
        return first_output(call(net, x))


def families(quick):
    """Parameters of a test: all families, those that are not named here as slow ones."""
    return [
        pytest.param(
            family, id=family.build.__name__, marks=() if family.build.__name__ in quick else pytest.mark.slow
        )
        for family in FAMILIES
    ]


def trained(family):
    """(network, data, plan) of one family."""
    torch.manual_seed(0)
    net, x = family.build()
    y = output_of(net.eval(), x)
    model = bmrs.Regressor(net, first_output, scale=float(y.std()) or 1.0)
    data = (x, y + 0.1 * y.std() * torch.randn_like(y))
    guide = bmrs.AutoKroneckerLaplace(model)
    bmrs.fit(model, guide, data, progress=False)
    return net, data, bmrs.reduce(model, guide)
