"""Fine-tuning on what the full network says, not on labels: finished runs, reduced anew and tuned on soft targets.

    OMP_NUM_THREADS=1 python analysis/soft_targets.py RUN… [--epochs 24] [--data-root FOLDER]

The teacher is the recipe's network without noise, trained for all epochs of the run; its logits at the training
inputs, divided by a temperature, are the targets (Hinton et al., 2015). The student is the run's reduced network,
as it was before its own fine-tuning. Among its epochs the best on validation data is taken, as everywhere.
Writes a row per run to soft_targets.csv in `--out`, with the run's own fine-tuned network beside it; called again it
goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from levers import tune_softly
from peers import measured, trained
from torch import nn
from trials import Rows, figures

import pyro_bmrs as bmrs
from pyro_bmrs.pruning.criteria import parse_criterion
from pyro_bmrs.runs.run import Run

TEMPERATURE = 3.0


@torch.no_grad()
def logits(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    net.eval()
    return torch.cat([net(part) for part in x.split(2000)])


def row_of(run: Run, epochs: int) -> dict[str, Any]:
    """Figures of teacher, of the run's fine-tuned network and of the student."""
    settings, data = run.settings, run.dataset
    run.load_posterior()
    teacher = trained(run.recipe, settings, data, settings.epochs + settings.fine_tune)
    soft = logits(teacher, data.train[:][0])
    criterion = parse_criterion(settings.criterion, settings.prior_log_odds)
    student = bmrs.reduce(run.model, run.guide, criterion).apply()
    tuning = settings.changed({"fine_tune": epochs})
    tune_softly(student, soft, 1.0, tuning, data, temperature=TEMPERATURE)
    return {
        **figures(student, data, run.parameters_before),
        "on_labels": measured(run.small_network(), data)["accuracy"],
        "teacher": measured(teacher, data)["accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--epochs", type=int, help="of the fine-tuning; default the run's own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soft_targets")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(given.out / "soft_targets.csv", ("recipe", "data", "kl_weight", "seed", "epochs"))
    for folder in given.runs:
        run = Run(folder, data_root=given.data_root, progress=False)
        settings = run.settings
        epochs = given.epochs or settings.fine_tune
        key = run.recipe.name, settings.data, settings.kl_weight, settings.seed, epochs
        if not rows.has(*key):
            rows.add(*key, **row_of(run, epochs))


if __name__ == "__main__":
    main()
