"""The calibration error that a network would have if its probabilities were true.

    OMP_NUM_THREADS=1 python analysis/chance_calibration.py --cells-out FOLDER [--cells NAME …] [--seeds 0]

Labels are drawn from the network's own probabilities of the test images, at the temperature of the validation images:
what is left of the error is chance, and no method is expected to be below. FOLDER is that of cells.py, with the full
networks that it has trained.

Writes a row for each network to `--out`/chance.csv: cell, seed, accuracy and calibrated_error (test, as in cells.csv),
by_chance and deviation (mean and standard deviation over 200 draws of all labels).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import CELLS, Cell
from trials import Rows

import pyro_bmrs as bmrs
from pyro_bmrs.quality import Predictions, predictions, quality, temperature, tempered

DRAWS = 200
ERROR = "expected_calibration_error"


def drawn(found: Predictions, generator: np.random.Generator) -> Predictions:
    """The same with labels that its probabilities are true of."""
    upto = found.probability.cumsum(1)
    labels = (generator.random((len(upto), 1)) * upto[:, -1:] > upto).sum(1)
    return replace(found, label=labels.astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells-out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    rows = Rows(given.out / "chance.csv", ("cell", "seed"))
    for name in given.cells:
        for seed in given.seeds:
            if rows.has(name, seed):
                continue
            cell = Cell(name, seed, given.cells_out, given.data_root)
            model = bmrs.Classifier(cell.trained(cell.epochs).eval())
            held_out, seen = (predictions(model, part, {}) for part in (cell.data.validation, cell.data.test))
            seen = tempered(seen, temperature(held_out))
            generator = np.random.default_rng(seed)
            errors = [quality(drawn(seen, generator))[ERROR] for _ in range(DRAWS)]
            own = quality(seen)
            rows.add(
                name, seed, accuracy=own["accuracy"], calibrated_error=own[ERROR], by_chance=np.mean(errors),
                deviation=np.std(errors),
            )  # fmt: skip


if __name__ == "__main__":
    main()
