"""Every subset of the diabetes data's ten measurements, fitted again by SVI: what evidence reduction saves.

    OMP_NUM_THREADS=1 python analysis/diabetes_refits.py [--out FOLDER]

About 30 minutes. Writes refits.csv: model (bit k of the number is 1 where measurement k is left out), elbo
(of the fitted full-rank guide, mean of 4,000 draws) and log_evidence (exact), both in nats, and seconds.
Goes on where it was stopped. `diabetes_ranking.py` compares these with the reduction of one fit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import pandas as pd
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from rich.progress import track
from torch import Tensor

from pyro_bmrs.files import write_atomically

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "models"))
import linear_regression as regression  # noqa: E402

STEPS, LEARNING_RATE, LAST, PARTICLES, DRAWS = 1000, 0.05, 0.01, 8, 4000


def fit(x: Tensor, y: Tensor, seed: int, kind: type[AutoGuide] = AutoMultivariateNormal) -> AutoGuide:
    """A guide after 1,000 steps of ClippedAdam whose learning rate falls from 0.05 to 0.0005."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = kind(regression.model)
    optimizer = pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "lrd": LAST ** (1 / STEPS)})
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(regression.model, guide, optimizer, elbo)
    for _ in range(STEPS):
        svi.step(x, y)
    return guide


def columns_of(model: int, count: int) -> list[int]:
    """The measurements that a model keeps."""
    return [k for k in range(count) if not model >> k & 1]


def evidence_bound(guide: AutoGuide, x: Tensor, y: Tensor) -> float:
    elbo = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -elbo.loss(regression.model, guide, x, y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results" / "diabetes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    x, y = regression.diabetes()
    path = given.out / "refits.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {row["model"] for row in rows}
    models = [model for model in range(2 ** x.shape[1] - 1) if model not in done]  # the empty one has no fit
    random.Random(0).shuffle(models)
    for count, model in enumerate(track(models, "models fitted again", disable=not sys.stderr.isatty()), 1):
        kept = x[:, columns_of(model, x.shape[1])]
        start = time.perf_counter()
        guide = fit(kept, y, seed=model)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "model": model,
                "elbo": round(evidence_bound(guide, kept, y), 4),
                "log_evidence": round(regression.log_evidence(kept, y), 6),
                "seconds": round(seconds, 3),
            }
        )
        if count % 16 == 0 or count == len(models):
            table = pd.DataFrame(rows).sort_values("model")
            write_atomically(path, lambda beside, table=table: table.to_csv(beside, index=False))


if __name__ == "__main__":
    main()
