"""ΔF by the guide and by the model itself where the exact value is known, and how often `reduce` warns without cause.

    OMP_NUM_THREADS=1 python analysis/evidence_conscience.py [--out FOLDER]

Eight schools, a logistic regression whose first two regressors have correlation 0.97, and a varying intercept. Exact
values are by quadrature. False alarms are counted over simulated regressions whose guide is the exact posterior.

Writes cases.csv (a row per reduction and guide, in nats; warned: whether a warning names this reduction),
alarms.csv; figures.py draws. It takes about five minutes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_bmrs as bmrs
from pyro_bmrs.evidence.importance import UnreliableEstimateWarning
from pyro_bmrs.figures.style import BLACK, BLUE, ORANGE, styled_figure
from pyro_bmrs.files import write_atomically

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "models"))
import known_evidence as known  # noqa: E402
import linear_regression as regression  # noqa: E402

DATA_SETS = 500


def fitted(kind: Any, model: Any, *args: Any, steps: int = 1000) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = kind(model)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
    return guide


def asked(model: Any, guide: Any, reduced: Any, *args: Any, **more: Any) -> tuple[pd.DataFrame, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan = bmrs.reduce(model, guide, reduced, *args, **more)
    return plan.checked, [
        str(one.message) for one in seen if issubclass(one.category, UnreliableEstimateWarning)
    ]


def problems() -> list[tuple[str, Any, tuple[Any, ...], list[tuple[Any, Any]], dict[str, float]]]:
    """(name, model, its arguments, (reduced priors, groups) of each call, exact ΔF by what is reduced)."""
    calls = [({"mu": 0.0, "z": 0.0}, {"both": {"mu": ..., "z": ...}}), ({"tau": dist.HalfCauchy(0.1)}, None)]
    patients, homes = known.correlated_data(0.97), known.houses()
    reduced = {"z": 0.0, "slope": 0.0, "spread": dist.HalfNormal(0.2)}
    return [
        ("eight schools", known.schools, (known.EFFECTS,), calls, known.exact_schools()),
        (
            "logistic, ρ = 0.97", known.logistic, patients, [({"weights": 0.0}, None)],
            known.exact_logistic(*patients),
        ),
        ("varying intercept", known.intercepts, homes, [(reduced, None)], known.exact_intercepts(*homes)),
    ]  # fmt: skip


def cases() -> pd.DataFrame:
    rows = []
    for problem, model, args, calls, exact in problems():
        for kind in (AutoNormal, AutoMultivariateNormal):
            guide = fitted(kind, model, *args)
            for reduced, groups in calls:
                checked, messages = asked(model, guide, reduced, *args, groups=groups)
                # a correlation speaks of all that is reduced
                every = any("for independent" in text for text in messages)
                for row in checked[checked.name.isin(list(exact))].itertuples():
                    named = any(row.name in text for text in messages)
                    rows.append(
                        dict(
                            problem=problem, guide=kind.__name__, reduced=row.name, exact=exact[row.name],
                            by_guide=row.log_evidence_change, by_model=row.checked,
                            standard_error=row.standard_error, khat=row.khat, warned=named or every,
                        )
                    )  # fmt: skip
    return pd.DataFrame(rows)


def alarms() -> pd.DataFrame:
    """Exact posteriors of simulated regressions: each weight at 0, and all of them. Data sets with a warning."""
    generator = torch.Generator().manual_seed(0)
    warned = 0
    for _ in range(DATA_SETS):
        x = torch.randn(50, 3, dtype=torch.float64, generator=generator)
        x[:, 1] += x[:, 0]
        y = x @ (0.3 * torch.randn(3, dtype=torch.float64, generator=generator))
        y = y + regression.NOISE * torch.randn(50, dtype=torch.float64, generator=generator)
        pyro.clear_param_store()
        warned += bool(asked(regression.model, regression.posterior(x, y), {"weights": 0.0}, x, y)[1])
    return pd.DataFrame([dict(data_sets=DATA_SETS, reductions=4 * DATA_SETS, with_a_warning=warned)])


def draw(table: pd.DataFrame) -> Figure:
    """Each reduction a row: the exact ΔF, the guide's and the model's."""
    with styled_figure(0.32 * len(table) + 1.2) as figure:
        axes = figure.add_subplot()
        places = range(len(table))
        axes.axvline(0.0, color="#999999", linewidth=0.8)
        axes.scatter(table.exact, places, marker="|", s=220, color=BLACK, label="exact", zorder=3)
        axes.scatter(table.by_guide, places, marker="o", s=26, color=ORANGE, label="by the guide")
        axes.errorbar(
            table.by_model, places, xerr=2 * table.standard_error, fmt="s", markersize=4, color=BLUE,
            label="by the model itself, ± 2 errors",
        )  # fmt: skip
        short = table.guide.str.replace("AutoNormal", "mean field").str.replace(
            "AutoMultivariateNormal", "full rank"
        )
        words = table.problem + ": " + table.reduced.str.replace("'", "") + ", " + short
        axes.set_yticks(
            list(places),
            [f"{text}{' ⚠' if on else ''}" for text, on in zip(words, table.warned, strict=True)],
        )
        axes.tick_params(axis="y", labelsize=7.5)
        axes.invert_yaxis()
        axes.set_xlabel("ΔF (nats); ⚠: reduce warns")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.0)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results" / "evidence_conscience")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    table, counted = cases(), alarms()
    for name, frame in (("cases.csv", table.round(4)), ("alarms.csv", counted)):
        write_atomically(given.out / name, lambda beside, frame=frame: frame.to_csv(beside, index=False))
    print(table.round(3).to_string(index=False), counted.to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
