"""The models of the diabetes data ranked by reducing one posterior, against fitting each again.

    OMP_NUM_THREADS=1 python analysis/diabetes_ranking.py [--out FOLDER]

Ten measurements, so 1,024 models. One posterior of the full model is reduced to each of them: the exact one, the
mean-field normal nearest to it, and full-rank and mean-field guides fitted by SVI. They are compared with the exact
log evidence of each model, and with the evidence lower bounds of `diabetes_refits.py`, which must have run before.
Then 2²⁰ models of 20 synthetic regressors, for time and memory.

Writes ranking.csv (a row per model: ΔF in nats by each way), summary.csv (per way: Spearman's rank correlation with the
exact evidence, the largest and the median error in nats, seconds) and twenty_groups.csv. Times are medians of 7 runs,
interleaved, of one thread, except where they are sums of fits. figures.py draws.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch
from diabetes_refits import columns_of, fit, regression
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuide

import pyro_bmrs as bmrs
from pyro_bmrs.files import write_atomically

ROOT = Path(__file__).parent.parent
REPEATS = 7


def reduced(guide: AutoGuide, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """ΔF of every model, from one posterior."""
    found = bmrs.exhaustive_reduction(regression.model, guide, {"weights": 0.0}, x, y, progress=False)
    return found.log_evidence_change.numpy()


def exact(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """log evidence of every model against the full one, each from its own posterior."""
    columns = x.shape[1]
    values = np.array(
        [regression.log_evidence(x[:, columns_of(model, columns)], y) for model in range(2**columns)]
    )
    return values - values[0]


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def twenty(groups: int = 20) -> pd.DataFrame:
    """All combinations of 20 synthetic regressors: seconds, and what the peak of resident memory grew by."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, groups, dtype=torch.float64, generator=generator)
    weights = torch.randn(groups, dtype=torch.float64, generator=generator)
    weights[::2] = 0
    y = x @ weights + regression.NOISE * torch.randn(300, dtype=torch.float64, generator=generator)
    pyro.clear_param_store()
    guide = regression.posterior(x, y)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = bmrs.exhaustive_reduction(regression.model, guide, {"weights": 0.0}, x, y, progress=False)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    some = torch.randint(2**groups - 1, (200,), generator=generator).tolist()
    full = regression.log_evidence(x, y)
    error = max(
        abs(
            regression.log_evidence(x[:, columns_of(model, groups)], y)
            - full
            - float(found.log_evidence_change[model])
        )
        for model in some
    )
    row = {
        "models": 2**groups,
        "seconds": round(seconds, 2),
        "peak_megabytes": round(grown / 1000, 1),
        "largest_error_nats_of_200": error,
    }
    return pd.DataFrame([row])


def draw(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    reference = table.exact
    for axes, (name, title) in zip(
        panels,
        (
            ("refitted_svi", "each model fitted again (SVI)"),
            ("reduced_svi", "one full-rank fit, reduced"),
            ("reduced_svi_mean_field", "one mean-field fit, reduced"),
        ),
        strict=True,
    ):
        axes.plot(table[name], reference, ".", ms=2.5, color="#0b559f", alpha=0.5)
        low = reference.min()
        axes.plot([low, 10], [low, 10], color="#999", lw=0.8)
        rank = table[name].corr(reference, method="spearman")
        axes.set_title(f"{title}\nrank correlation {rank:.4f}", fontsize=8.5)
        axes.set_xlabel("estimated (nats)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact log evidence of the model\nagainst the full one (nats)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results" / "diabetes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    million = twenty()  # first: a peak of memory can only grow
    x, y = regression.diabetes()
    refits = pd.read_csv(given.out / "refits.csv").set_index("model")
    empty = refits.log_evidence.to_dict() | {2 ** x.shape[1] - 1: regression.log_evidence(x[:, []], y)}
    guides: dict[str, AutoGuide] = {}
    for name, make in {
        "reduced_exact": lambda: regression.posterior(x, y),
        "reduced_mean_field": lambda: regression.posterior(x, y, mean_field=True),
        "reduced_svi": lambda: fit(x, y, seed=0),
        "reduced_svi_mean_field": lambda: fit(x, y, seed=0, kind=AutoDiagonalNormal),
    }.items():
        start = time.perf_counter()
        pyro.clear_param_store()
        guides[name] = make()
        print(f"{name}: posterior made in {time.perf_counter() - start:.2f} s")
    seconds = timed({name: lambda guide=guide: reduced(guide, x, y) for name, guide in guides.items()})
    seconds["exact"] = timed({"exact": lambda: exact(x, y)})["exact"]
    table = pd.DataFrame({name: reduced(guide, x, y) for name, guide in guides.items()})
    table.insert(0, "exact", exact(x, y))
    bounds = refits.elbo.to_dict() | {
        2 ** x.shape[1] - 1: empty[2 ** x.shape[1] - 1]
    }  # without latents, exact
    table["refitted_svi"] = [bounds[model] - bounds[0] for model in range(len(table))]
    seconds["refitted_svi"] = float(refits.seconds.sum())
    rows = []
    for name in (
        "reduced_exact",
        "reduced_svi",
        "reduced_mean_field",
        "reduced_svi_mean_field",
        "refitted_svi",
        "exact",
    ):
        error = (table[name] - table.exact).abs()
        top = table.exact.nlargest(100).index
        rows.append(
            {
                "way": name,
                "rank_correlation": round(table[name].corr(table.exact, method="spearman"), 5),
                "rank_correlation_with_svi": round(
                    table[name].corr(table.refitted_svi, method="spearman"), 5
                ),
                "rank_correlation_best_100": round(
                    table[name][top].corr(table.exact[top], method="spearman"), 5
                ),
                "largest_error_nats": float(f"{error.max():.3g}"),
                "median_error_nats": float(f"{error.median():.3g}"),
                "seconds": round(seconds[name], 4),
            }
        )
    summary = pd.DataFrame(rows)
    for name, frame in (
        ("ranking.csv", table.round(6).rename_axis("model").reset_index()),
        ("summary.csv", summary),
        ("twenty_groups.csv", million),
    ):
        write_atomically(given.out / name, lambda beside, frame=frame: frame.to_csv(beside, index=False))
    print(summary.to_string(index=False), million.to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
