"""A fit that torchrun starts in two processes; each writes what it ended with to FOLDER/rank-N.pt."""

import sys
from pathlib import Path

import torch
from torch import nn

import pyro_bmrs as bmrs


def data(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def made():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 2)
    )
    model = bmrs.Classifier(net)
    return model, bmrs.AutoTruncatedLogNormal(model)


# 203 = 4 · 50 + 3: the last batch is too small to be shared
SETTINGS = dict(
    epochs=30, batch_size=50, learning_rate=1e-2, posterior_learning_rate=5e-2, kl_weight=5.0,
    removal="epoch", progress=False,
)  # fmt: skip


def fitted(**options):
    model, guide = made()
    result = bmrs.fit(
        model, guide, data(203, 0), data(100, 1), criterion=bmrs.BMRS_N(), **{**SETTINGS, **options}
    )
    return model, guide, result


def tuned():
    """The losses of a fit without noise, and the weights that it ended with."""
    torch.manual_seed(0)
    model = bmrs.Classifier(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)))
    result = bmrs.fit(
        model, None, data(203, 0), epochs=6, batch_size=50, learning_rate=1e-2, keep_best=False, progress=False,
        accumulate=2, gradient_clip=0.5,
    )  # fmt: skip
    return result.history.loss.tolist(), model.net[0].weight.detach().clone()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model, guide, result = fitted(checkpoints=folder / "checkpoints")
    plan = bmrs.reduce(model, guide, bmrs.BMRS_N())
    state = {
        "model": model.state_dict(),
        "guide": guide.state_dict(),
        "kept": plan.kept,
        "loss": result.history.loss.tolist(),
        "removals": result.removals.to_csv(),
    }
    state["tuned"] = tuned()
    torch.save(state, folder / f"rank-{torch.distributed.get_rank()}.pt")
