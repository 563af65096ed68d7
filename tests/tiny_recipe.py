"""A recipe small enough for tests, in which every other structure is dead from the start, so that some go."""

from torch import nn

from pyro_bmrs import AutoTruncatedLogNormal, MultiplicativeNoise

SETTINGS = {
    "default": {
        "epochs": 2,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "kl_weight": 2.0,
        "fine_tune": 1,
        "limit": 200,
    }
}


class HalfDead(AutoTruncatedLogNormal):
    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        for posterior in self.posteriors:
            posterior.loc.data[1::2] = -19.0
            posterior.log_scale.data[1::2] = 0.0


def network(input_shape, num_classes, filters=6, units=20):
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, filters, 3), nn.ReLU(), nn.MaxPool2d(2), MultiplicativeNoise(filters),
        nn.Flatten(), nn.Linear(filters * (height // 2 - 1) * (width // 2 - 1), units), nn.Tanh(),
        MultiplicativeNoise(units), nn.Linear(units, num_classes),
    )  # fmt: skip


def guide(model):
    return HalfDead(model)
