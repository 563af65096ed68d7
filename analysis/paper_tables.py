"""The paper's tables, by `pyro-bmrs sweep`: two networks, three data sets, its criteria, two ways to weigh the KL.

    OMP_NUM_THREADS=1 python analysis/paper_tables.py [--data-root FOLDER] [--seeds 0 1 2] [--only mlp-mnist …]

The networks, the split of the data, the batch sizes and the learning rates are those of Wright et al. (2024); one
fit serves all criteria, each reduction is fine-tuned. The two settings of the KL:

- `uniform`: ours, one weight for every unit;
- `released`: that of the authors' released code, the mean over the units of a layer, then over layers, beside a
  mean over examples (recipes made from models/ and released_weighting.py).

Every run is a folder in `--runs` and every finished one a row of cells.csv in `--out`; called again it goes on where
it was stopped. table.md sets the means over seeds beside the published figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
import yaml

from pyro_bmrs.files import write_atomically, write_table
from pyro_bmrs.runs.folder import RunFolder
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings
from pyro_bmrs.runs.study import Study
from pyro_bmrs.runs.sweep import run_study

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
CRITERIA = {
    "BMRS_N": "BMRS_N",
    "BMRS_U:bits=8": "BMRS_U-8",
    "BMRS_U:bits=4": "BMRS_U-4",
    "BMRS_U:bits=8,prior_log_odds=0": "BMRS_U-8, log-odds 0",
    "BMRS_U:bits=4,prior_log_odds=0": "BMRS_U-4, log-odds 0",
    "SNR": "SNR",
    "ExpectedScale": "E[θ]",
    "WeightNorm": "weight norm",
}
DATA = ("mnist", "fashion-mnist", "cifar10")
# Parameters removed and accuracy in per cent, means of ten seeds: Wright et al. (2024), continuous removal.
PUBLISHED = pd.read_csv(HERE / "studies" / "published.csv")
CELLS = [*dict.fromkeys(PUBLISHED.cell)]


def study_of(name: str, released: bool, weight: float, seeds: list[int], runs: Path) -> Study:
    """One cell of the table: a recipe and a data set, all criteria, one setting of the KL."""
    stem, data = name.split("-", 1)
    recipe = MODELS / f"{stem}.py"
    if released:
        made = runs / "recipes" / f"{stem}_released.py"
        text = recipe.read_text() + "\n\n" + (HERE / "released_weighting.py").read_text()
        write_atomically(made, lambda beside: beside.write_text(text))
        recipe = made
    settings: dict[str, object] = {"schedule": "cosine", "weight_decay": 0.0}
    if stem == "mlp":
        own = RunSettings.of(Recipe.read(recipe), data, {}).network or {}
        settings["network"] = {**own, "select_inputs": False}
    document = {
        "out": str(runs), "recipes": [str(recipe.resolve())], "data": [data], "seeds": seeds,
        "kl_weights": [1.0 if released else weight], "criteria": [*CRITERIA],
        "settings": settings,
    }  # fmt: skip
    manifest = runs / "studies" / f"{name}-{'released' if released else 'uniform'}.yaml"
    write_atomically(manifest, lambda beside: beside.write_text(yaml.safe_dump(document, sort_keys=False)))
    return Study.read(manifest)


def rows_of(name: str, setting: str, study: Study) -> list[dict[str, object]]:
    """A row per finished cell, and one of the network as it was fitted, per seed."""
    rows: list[dict[str, object]] = []
    for cell in study.cells:
        folder = RunFolder(cell.folder)
        if not folder.has("plan.json", "evaluation.csv"):
            continue
        table = folder.evaluation().set_index("network")
        full, last = table.iloc[0], table.iloc[-1]
        same = {"cell": name, "kl": setting, "kl_weight": cell.settings.kl_weight, "seed": cell.settings.seed}
        if cell.fits:
            rows.append(
                same | {"criterion": "none", "parameters": full.parameters, "removed": 0.0, "accuracy": full.accuracy,
                        "negative_log_likelihood": full.negative_log_likelihood}
            )  # fmt: skip
        rows.append(
            same | {
                "criterion": CRITERIA[cell.settings.criterion], "parameters": last.parameters,
                "removed": 1 - last.parameters / full.parameters, "accuracy": last.accuracy,
                "negative_log_likelihood": last.negative_log_likelihood,
                "accuracy_before_tuning": table.accuracy.get("reduced"),
            }
        )  # fmt: skip
    return rows


def table_of(cells: pd.DataFrame) -> str:
    """Markdown: a line per cell and criterion, parameters removed / test accuracy in per cent, published and ours."""
    lines = [
        "| cell | criterion | published | uniform, w | seeds | released weighting | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    published = PUBLISHED.set_index(["cell", "criterion"])
    for name in CELLS:
        for criterion in ("none", *CRITERIA.values()):
            told = ["–"]
            if (name, criterion) in published.index:
                row = published.loc[(name, criterion)]
                told = [f"{row.removed:.1f} / {row.accuracy:.2f}"]
            for setting in ("uniform", "released"):
                found = cells[(cells.cell == name) & (cells.criterion == criterion) & (cells.kl == setting)]
                if found.empty:
                    told += ["not run", "0"]
                    continue
                weight = f", {found.kl_weight.iloc[0]:g}" if setting == "uniform" else ""
                means = f"{100 * found.removed.mean():.1f} / {100 * found.accuracy.mean():.2f}"
                told += [means + weight, str(len(found))]
            lines.append(f"| {name} | {criterion} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("studies"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paper_tables")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--kl-weight", type=float, default=100.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=CELLS, default=CELLS, metavar="CELL")
    parser.add_argument(
        "--settings", nargs="+", choices=["uniform", "released"], default=["uniform", "released"]
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.out / "cells.csv"
    for setting in given.settings:
        for name in given.only:
            study = study_of(name, setting == "released", given.kl_weight, given.seeds, given.runs.resolve())
            run_study(study, data_root=given.data_root)
            new = pd.DataFrame(rows_of(name, setting, study))
            if path.exists():
                earlier = pd.read_csv(path)
                new = pd.concat([earlier, new], ignore_index=True)
            new = new.drop_duplicates(["cell", "kl", "seed", "criterion"], keep="last")
            write_table(path, new)
            write_atomically(given.out / "table.md", lambda beside, new=new: beside.write_text(table_of(new)))


if __name__ == "__main__":
    main()
