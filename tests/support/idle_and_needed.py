"""A small network whose structures go from clearly idle to clearly needed, without a fit."""

import torch
from torch import nn

import pyro_bmrs as bmrs


def idle_and_needed(log_scale: float = 0.0):
    """(model, guide, batch): two layers of 6 and 5 structures, log θ from -22 to 0."""
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), bmrs.MultiplicativeNoise(6),
        nn.Linear(6, 5), nn.ReLU(), bmrs.MultiplicativeNoise(5), nn.Linear(5, 2),
    )  # fmt: skip
    model = bmrs.Classifier(net)
    guide = bmrs.AutoTruncatedLogNormal(model)
    batch = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    guide(*batch)
    with torch.no_grad():
        for posterior in guide.posteriors:
            posterior.loc.copy_(torch.linspace(-22, 0, len(posterior.loc)))
            posterior.log_scale.fill_(log_scale)
    return model, guide, batch
