"""Fits of a second or less, made anew each time: what tests of checkpoints interrupt, kill and repeat."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pyro_bmrs as bmrs
from pyro_bmrs import AutoTruncatedLogNormal, Classifier, MultiplicativeNoise

EPOCHS, BATCHES = 5, 5


def data(examples=95, seed=0):
    """Of 95 examples the last batch of 20 has 15."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


class Augmented(Dataset):
    """Examples that are drawn with noise, from the global generator, whenever they are asked for."""

    def __init__(self, augment=True):
        self.x, self.y = data()
        self.augment = augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(6) * self.augment, self.y[index]


def plain():
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), MultiplicativeNoise(12), nn.Linear(12, 8), nn.Tanh(), MultiplicativeNoise(8),
        nn.Linear(8, 2),
    )  # fmt: skip


def with_statistics():
    """What has a state beside its weights, and what draws random numbers."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), MultiplicativeNoise(12),
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), MultiplicativeNoise(8), nn.Linear(8, 2),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        x = self.stem(x).tanh()
        return self.head(x + self.norm(self.inner(x)).tanh())


def residual():
    return nn.Sequential(Residual(), nn.Tanh(), nn.Linear(2, 2))


def inserted():
    torch.manual_seed(1)
    return bmrs.insert_noise(residual(), torch.randn(4, 6))


class HalfDead(AutoTruncatedLogNormal):
    """Every other structure is dead from the start, and some more die later, one by one."""

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        for posterior in self.posteriors:
            posterior.loc.data[1::2] = -19.0
            posterior.log_scale.data[1::2] = 0.0
            later = posterior.loc.data[2::2]
            later.copy_(torch.linspace(-2.0, -7.0, len(later)))
            posterior.log_scale.data[2::2] = torch.linspace(-1.0, 0.5, len(later))


REMOVAL = dict(removal="epoch", criterion=bmrs.BMRS_N(), kl_weight=20.0, posterior_learning_rate=0.1)
# of each: the network, the source of its examples, and what differs from the fit of `run`
CASES = {
    "plain": (plain, data, {}),
    "rising": (plain, data, dict(kl_weight="auto", posterior_learning_rate=0.3)),
    "no guide": (None, data, dict(schedule="cosine")),
    "removal": (plain, data, REMOVAL),
    "accumulate": (plain, data, {**REMOVAL, "accumulate": 2, "posterior_learning_rate": 0.2}),
    "clip": (plain, data, {**REMOVAL, "gradient_clip": 0.05, "weight_decay": 0.5}),
    "statistics": (with_statistics, data, REMOVAL),
    "inserted": (inserted, data, REMOVAL),
    "patience": (plain, data, dict(patience=1, learning_rate=0.3, warm_up=0.0, epochs=20)),
    "dataset": (plain, Augmented, {}),
    "loader": (plain, lambda: DataLoader(Augmented(), batch_size=20, shuffle=True), {}),
    "packed": (plain, data, {**REMOVAL, "elbo": "packed"}),
    "pyro": (plain, data, {**REMOVAL, "elbo": "pyro", "draws_per_batch": None}),
    "bf16": (with_statistics, data, {**REMOVAL, "precision": "bf16-mixed"}),
    "frozen": (with_statistics, data, dict(freeze_weights=True)),
    "last": (plain, data, dict(keep_best=False, schedule="linear")),
}


class SmallFit:
    """A model and a guide of a case, freshly made, and their fit."""

    def __init__(self, case, seed=0):
        make, self.source, self.options = CASES[case]
        torch.manual_seed(seed)
        if make is None:
            self.model, self.guide = (
                Classifier(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2))),
                None,
            )
        else:
            self.model = Classifier(make())
            kind = HalfDead if self.options.get("removal") else AutoTruncatedLogNormal
            self.guide = kind(self.model)

    def run(self, folder, **options):
        """The fit. Its result, and the tensors of model and guide by name."""
        settings = {
            **dict(
                epochs=EPOCHS,
                batch_size=20,
                learning_rate=1e-2,
                posterior_learning_rate=5e-2,
                warm_up=0.2,
                kl_weight=1.0,
            ),
            **dict(draws_per_batch=4, progress=False, checkpoints=folder),
            **self.options,
            **options,
        }
        torch.manual_seed(99)
        train, (x, y), dtype = self.source(), data(60, 1), next(self.model.parameters()).dtype
        if isinstance(train, tuple):
            train = train[0].to(dtype), train[1]
        self.result = bmrs.fit(self.model, self.guide, train, (x.to(dtype), y), **settings)
        return self.result, self.tensors()

    def tensors(self):
        modules = {"model": self.model, **({} if self.guide is None else {"guide": self.guide})}
        return {
            f"{name}.{key}": tensor.clone()
            for name, module in modules.items()
            for key, tensor in module.state_dict().items()
        }
