"""What lifts accuracy at a given size and is still the same model: each lever alone, at one KL weight.

    OMP_NUM_THREADS=1 python analysis/levers.py models/mlp.py mnist --kl-weight 100 --seeds 0 1 2 [--data-root FOLDER]

`base` is what the study does: cosine rates in fit and fine-tuning, 16 stratified draws per batch, warm-up over a
quarter of the epochs, reduction at the end, labels as they are. A lever that changes what is removed moves along the
curve of sizes as well: `base` at half and twice the KL weight says how much of a difference that explains. Total
numbers of epochs are equal. Writes a row per lever and seed to levers.csv in `--out`; called again it goes on.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from peers import measured, tune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trials import Rows, Trial, figures, parser_of_trials, trials

import pyro_bmrs as bmrs
from pyro_bmrs.data import Dataset
from pyro_bmrs.quality import predictions
from pyro_bmrs.runs.recipe import Settings

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
    "weight decay 0.03": {"weight_decay": 0.03},
    "weight decay 0.1": {"weight_decay": 0.1},
}
OF_TUNING = ("soft targets, half", "soft targets", "twice the tuning rate")
LEVERS = (*OF_FIT, *OF_TUNING, "reduced and fitted twice")


def fitted(trial: Trial, changes: dict[str, Any], halves: int = 1) -> Any:
    """Model and guide after the epochs of the fit; in two halves, reduced in between."""
    model, guide = trial.start()
    options = dict(changes)
    options["kl_weight"] = trial.settings.kl_weight * options.get("kl_weight", 1.0)
    if options.get("removal"):
        options["criterion"] = bmrs.BMRS_N()
    for half in range(halves):
        if half:
            bmrs.reduce(model, guide, bmrs.BMRS_N()).shrink(model, guide)
        trial.fit(model, guide, epochs=trial.settings.epochs // halves, **options)
    return model, guide


@cache
def base(trial: Trial) -> Any:
    """The fit that all levers of the tuning share."""
    return fitted(trial, {})


def tune_softly(
    net: nn.Module, soft: Tensor, share: float, settings: Settings, data: Dataset, *, temperature: float = 1.0
) -> None:
    """As `tune`, the labels mixed with what a teacher says, its logits divided by the temperature as the net's are."""
    x, y = data.train[:]
    targets = (soft / temperature).softmax(dim=-1)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    steps = settings.fine_tune * -(-len(x) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -1.0, net.state_dict()
    for epoch in range(settings.fine_tune):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * settings.seed + epoch))
        net.train()
        for indices in order.split(settings.batch_size):
            output = net(x[indices])
            softly = temperature**2 * cross_entropy(output / temperature, targets[indices])
            loss = (1 - share) * cross_entropy(output, y[indices]) + share * softly
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval()
        accuracy = measured(net, data)["validation_accuracy"]
        if accuracy >= best:
            best, kept = accuracy, {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.load_state_dict(kept)


def teacher(model: nn.Module, guide: Any, trial: Trial) -> Tensor:
    """Log of the posterior predictive at the training inputs, (examples, classes)."""
    scales = {site: q.sample((TEACHER_DRAWS,)).float() for site, q in guide.posterior().items()}
    return (
        torch.tensor(predictions(model, trial.data.train[:], scales).probability)
        .clamp(min=1e-30)
        .log()
        .float()
    )


def small_network(lever: str, trial: Trial) -> nn.Module:
    """The tuned small network of a lever; those of the tuning share the base's fit."""
    if lever in OF_FIT and lever != "base":
        model, guide = fitted(trial, OF_FIT[lever])
    elif lever == "reduced and fitted twice":
        model, guide = fitted(trial, {}, halves=2)
    else:
        model, guide = base(trial)
    settings, data = trial.settings, trial.data
    settings = settings.changed({"weight_decay": OF_FIT.get(lever, {}).get("weight_decay")})
    small = bmrs.reduce(model, guide, bmrs.BMRS_N()).apply()
    if lever.startswith("soft targets"):
        tune_softly(small, teacher(model, guide, trial), 0.5 if "half" in lever else 1.0, settings, data)
    elif lever == "twice the tuning rate":
        tune(small, settings.changed({"learning_rate": 2 * settings.learning_rate}), data, settings.fine_tune)
    else:
        tune(small, settings, data, settings.fine_tune)
    return small


def main() -> None:
    parser = parser_of_trials(__doc__, "levers")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=LEVERS, metavar="LEVER")
    given = parser.parse_args()
    rows = Rows(given.out / "levers.csv", ("recipe", "data", "seed", "lever"))
    for trial in trials(given):
        for lever in given.levers:
            key = given.recipe.name, given.data, trial.settings.seed, lever
            if rows.has(*key):
                continue
            begin = time.perf_counter()
            torch.manual_seed(trial.settings.seed)
            small = small_network(lever, trial)
            rows.add(
                *key, kl_weight=trial.settings.kl_weight, **figures(small, trial.data, trial.before),
                seconds=round(time.perf_counter() - begin, 1),
            )  # fmt: skip


if __name__ == "__main__":
    main()
