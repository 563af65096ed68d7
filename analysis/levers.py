"""What lifts accuracy at a given size and is still the same model: each lever alone, at one KL weight.

    OMP_NUM_THREADS=1 python analysis/levers.py models/mlp.py mnist --kl-weight 100 --seeds 0 1 2 [--data-root FOLDER]

`base` is what the study does: cosine rates in fit and fine-tuning, 16 stratified draws per batch, warm-up over a
quarter of the epochs, reduction at the end, labels as they are. A lever that changes what is removed moves along the
curve of sizes as well: `base` at half and twice the KL weight says how much of a difference that explains. Total
numbers of epochs are equal. Writes a row per lever and seed to levers.csv in `--out`; called again it goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compression_curves import Rows
from peers import measured, tune, widths_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset, load_data
from pyro_bmrs.diagnostics import predictions
from pyro_bmrs.networks.cost import parameters
from pyro_bmrs.recipes import Recipe, Settings

# Draws of θ in the posterior predictive that is a teacher.
TEACHER_DRAWS = 32

# Arguments of the fit other than the base's, by lever.
OF_FIT: dict[str, dict[str, Any]] = {
    "base": {},
    "half the weight": {"kl_weight": 0.5},
    "twice the weight": {"kl_weight": 2.0},
    "constant rate": {"schedule": "constant"},
    "no warm-up": {"warm_up": 0.0},
    "warm-up over all": {"warm_up": 1.0},
    "4 draws": {"draws_per_batch": 4},
    "a draw per example": {"draws_per_batch": None},
    "16 independent draws": {"stratified": False},
    "removal after each epoch": {"removal": "epoch"},
}
OF_TUNING = ("soft targets, half", "soft targets", "twice the tuning rate")
LEVERS = (*OF_FIT, *OF_TUNING, "reduced and fitted twice")


def fitted(
    recipe: Recipe, settings: Settings, data: Dataset, changes: dict[str, Any], halves: int = 1
) -> Any:
    """Model and guide after the epochs of the fit; in two halves, reduced in between."""
    model = recipe.model(recipe.network(data, settings.network or {}, settings.seed))
    guide = recipe.guide(model)
    options = {"schedule": "cosine", **changes}
    options["kl_weight"] = settings.kl_weight * options.get("kl_weight", 1.0)
    if options.get("removal"):
        options["criterion"] = bmrs.BMRS_N()
    for half in range(halves):
        if half:
            bmrs.reduce(model, guide, bmrs.BMRS_N()).shrink(model, guide)
        bmrs.fit(
            model, guide, data.train, data.validation, epochs=settings.epochs // halves,
            batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            posterior_learning_rate=settings.posterior_learning_rate, seed=settings.seed, progress=False, **options,
        )  # fmt: skip
    return model, guide


def tune_softly(net: nn.Module, soft: Tensor, share: float, settings: Settings, data: Dataset) -> None:
    """As `tune`, the labels mixed with the probabilities of a teacher."""
    x, y = data.train[:]
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate, fused=True)
    steps = settings.fine_tune * -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -1.0, net.state_dict()
    for epoch in range(settings.fine_tune):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * settings.seed + epoch))
        net.train()
        for indices in order.split(settings.batch_size):
            output = net(x[indices])
            loss = (1 - share) * cross_entropy(output, y[indices]) + share * cross_entropy(
                output, soft[indices]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        accuracy = measured(net, data)["validation_accuracy"]
        if accuracy >= best:
            best, kept = accuracy, {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(kept)


def teacher(model: nn.Module, guide: Any, data: Dataset) -> Tensor:
    """The posterior predictive at the training inputs, (examples, classes)."""
    scales = {site: q.sample((TEACHER_DRAWS,)).float() for site, q in guide.posterior().items()}
    return torch.tensor(predictions(model, data.train[:], scales).probability).float()


def small_network(
    lever: str, recipe: Recipe, settings: Settings, data: Dataset, base: Callable[[], Any]
) -> nn.Module:
    """The tuned small network of a lever; those of the tuning share the base's fit."""
    if lever in OF_FIT and lever != "base":
        model, guide = fitted(recipe, settings, data, OF_FIT[lever])
    elif lever == "reduced and fitted twice":
        model, guide = fitted(recipe, settings, data, {}, halves=2)
    else:
        model, guide = base()
    small = bmrs.reduce(model, guide, bmrs.BMRS_N()).apply(measure=False)
    if lever.startswith("soft targets"):
        tune_softly(small, teacher(model, guide, data), 0.5 if "half" in lever else 1.0, settings, data)
    elif lever == "twice the tuning rate":
        tune(small, settings.changed({"learning_rate": 2 * settings.learning_rate}), data, settings.fine_tune)
    else:
        tune(small, settings, data, settings.fine_tune)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("--kl-weight", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=LEVERS, metavar="LEVER")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "levers")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe.read(given.recipe)
    rows = Rows(given.out / "levers.csv", ("recipe", "data", "seed", "lever"))
    for seed in given.seeds:
        settings = Settings.of(recipe, given.data, {"seed": seed, "kl_weight": given.kl_weight})
        data = load_data(given.data, data_root=given.data_root, image_size=settings.image_size, seed=seed)
        full = parameters(bmrs.without_noise(recipe.network(data, settings.network or {}, seed)))
        made: list[Any] = []

        def base(settings: Settings = settings, data: Dataset = data, made: list[Any] = made) -> Any:
            if not made:
                made.append(fitted(recipe, settings, data, {}))
            return made[0]

        for lever in given.levers:
            if rows.has(given.recipe.name, given.data, seed, lever):
                continue
            begin = time.perf_counter()
            torch.manual_seed(seed)
            small = small_network(lever, recipe, settings, data, base)
            size = parameters(small)
            rows.add(
                given.recipe.name, given.data, seed, lever, kl_weight=settings.kl_weight, parameters=size,
                removed=1 - size / full, widths="-".join(map(str, widths_of(small))), **measured(small, data),
                seconds=round(time.perf_counter() - begin, 1),
            )  # fmt: skip


if __name__ == "__main__":
    main()
