"""LeNet-5-Caffe on MNIST against published Bayesian compression, by structures alone.

    OMP_NUM_THREADS=1 python analysis/lenet5_caffe.py [--runs FOLDER] [--data-root FOLDER]

does the runs of studies/lenet5_caffe.yaml (resumable: called again it goes on), and writes to `--out` cells.csv, a
row per run with the widths found, and table.md, which sets their means beside the published figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from pyro_bmrs.files import write_atomically, write_table
from pyro_bmrs.runs.folder import RunFolder
from pyro_bmrs.runs.study import Study
from pyro_bmrs.runs.sweep import run_study

HERE = Path(__file__).parent
PARAMETERS = 431_080
# Compression by number of weights, test error (%) and widths, as these papers give them.
PUBLISHED = (
    ("SBP (Neklyudov et al., 2017)", 5.1, 0.86, ""),
    ("L0 (Louizos et al., 2018)", 11.0, 0.9, ""),
    ("L0-sep (Louizos et al., 2018)", 70.0, 1.0, ""),
    ("BC-GNJ (Louizos et al., 2017)", 108.0, 1.0, "8-13-88-13"),
    ("BC-GHS (Louizos et al., 2017)", 156.0, 1.0, "5-10-76-16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs; default the study's")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "lenet5_caffe")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study.read(HERE / "studies" / "lenet5_caffe.yaml", out=given.runs)
    table = run_study(study, data_root=given.data_root)
    done = table[table.status == "done"].copy()
    by_folder = {cell.name: cell.folder for cell in study.cells}
    done["widths"] = [
        "-".join(map(str, RunFolder(by_folder[name]).plan().widths().after)) for name in done.folder
    ]
    done["compression"] = PARAMETERS / done.parameters_after.astype(int)
    done["error"] = 1 - done.accuracy
    columns = ["parameters_after", "compression", "error", "negative_log_likelihood", "seconds"]
    write_table(given.out / "cells.csv", done[["seed", "kl_weight", "widths", *columns]])
    lines = ["| | compression | test error (%) | widths |", "|---|---:|---:|---|"]
    lines += [f"| {name} | {ratio:g}× | {error:g} | {widths} |" for name, ratio, error, widths in PUBLISHED]
    for weight, cells in done.groupby("kl_weight"):
        ratio = PARAMETERS / pd.to_numeric(cells.parameters_after).mean()
        lines.append(
            f"| BMRS_N, w = {weight:g}, mean of {len(cells)} seeds | {ratio:.0f}× | {100 * cells.error.mean():.2f} | "
            f"{', '.join(cells.widths)} |"
        )
    write_atomically(given.out / "table.md", lambda beside: beside.write_text("\n".join(lines) + "\n"))


if __name__ == "__main__":
    main()
