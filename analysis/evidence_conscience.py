"""ΔF by the guide and by the model itself where the exact value is known, and how often `reduce` warns without cause.

    OMP_NUM_THREADS=1 python analysis/evidence_conscience.py [--out FOLDER]

Eight schools, a logistic regression whose first two regressors have correlation 0.97, and a varying intercept. Exact
values are by quadrature. False alarms are counted over simulated regressions whose guide is the exact posterior.

Writes cases.csv (a row per reduction and guide, in nats; warned: whether a warning names this reduction),
alarms.csv and cases.svg. It takes about five minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
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
import linear_regression as regression  # noqa: E402

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COUNTY = torch.arange(10).repeat_interleave(6)
DATA_SETS = 500


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, ERRORS), obs=y)


def logistic(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[1]), 1.5).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * weights).sum(-1)), obs=y)


def intercepts(x, y):
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("counties", 10):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("houses", len(x)):
        pyro.sample("y", dist.Normal(base + slope * x + (spread * z)[..., COUNTY], 0.75), obs=y)


def exact_schools(mu_scale: float = 5.0, tau_scale: float = 5.0) -> float:
    """log p(y): a sum over tau = scale · tan(u), normal given tau."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi / 2
    variance = ERRORS.double().square() + (tau_scale * u.tan()).square().unsqueeze(-1)
    ones = mu_scale * torch.ones(len(u), 8, 1, dtype=torch.float64)
    law = dist.LowRankMultivariateNormal(torch.zeros(8, dtype=torch.float64), ones, variance)
    return float(law.log_prob(EFFECTS.double()).logsumexp(0)) - math.log(len(u))


def exact_logistic(x: torch.Tensor, y: torch.Tensor) -> float:
    line = torch.linspace(-7.0, 7.0, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * x.shape[1]).reshape(-1, x.shape[1])
    log_likelihood = torch.nn.functional.logsigmoid((2 * y - 1).double() * (grid @ x.double().T)).sum(-1)
    density = log_likelihood + dist.Normal(0.0, 1.5).log_prob(grid).sum(-1)
    return float(density.logsumexp(0)) + x.shape[1] * math.log(float(line[1] - line[0]))


def exact_intercepts(x: torch.Tensor, y: torch.Tensor, *, slope: float = 1.0, spread: float = 1.0) -> float:
    ones, members = torch.ones_like(x), torch.nn.functional.one_hot(COUNTY).double()
    fixed = 4 * ones.outer(ones) + slope**2 * x.outer(x) + 0.75**2 * torch.eye(len(x))
    u = (torch.arange(400).double() + 0.5) / 80
    covariance = fixed.double() + (spread * u)[:, None, None].square() * (members @ members.T)
    density = dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(y.double())
    return float((density + dist.HalfNormal(torch.tensor(1.0).double()).log_prob(u)).logsumexp(0)) - math.log(
        80
    )


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
    full = exact_schools()
    of_schools = {
        "site 'z'": exact_schools(tau_scale=0.0) - full,
        "site 'mu'": exact_schools(mu_scale=1e-9) - full,
        "group 'both'": exact_schools(1e-9, 0.0) - full,
        "site 'tau'": exact_schools(tau_scale=0.1) - full,
    }
    calls = [({"mu": 0.0, "z": 0.0}, {"both": {"mu": ..., "z": ...}}), ({"tau": dist.HalfCauchy(0.1)}, None)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 2, generator=generator)
    x[:, 1] = 0.97 * x[:, 0] + math.sqrt(1 - 0.97**2) * x[:, 1]
    y = torch.bernoulli(torch.sigmoid(0.8 * x[:, 0]), generator=generator)
    full = exact_logistic(x, y)
    of_weights = {
        "weights[0]": exact_logistic(x[:, 1:], y) - full,
        "weights[1]": exact_logistic(x[:, :1], y) - full,
        "site 'weights'": len(y) * math.log(0.5) - full,
    }
    generator = torch.Generator().manual_seed(2)
    homes = torch.randint(0, 2, (60,), generator=generator).float()
    levels = 1.3 - 0.3 * homes + (0.15 * torch.randn(10, generator=generator))[COUNTY]
    levels = levels + 0.75 * torch.randn(60, generator=generator)
    full = exact_intercepts(homes, levels)
    of_counties = {
        "site 'z'": exact_intercepts(homes, levels, spread=0.0) - full,
        "site 'slope'": exact_intercepts(homes, levels, slope=0.0) - full,
        "site 'spread'": exact_intercepts(homes, levels, spread=0.2) - full,
    }
    reduced = {"z": 0.0, "slope": 0.0, "spread": dist.HalfNormal(0.2)}
    return [
        ("eight schools", schools, (EFFECTS,), calls, of_schools),
        ("logistic, ρ = 0.97", logistic, (x, y), [({"weights": 0.0}, None)], of_weights),
        ("varying intercept", intercepts, (homes, levels), [(reduced, None)], of_counties),
    ]


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
    with mpl.rc_context({"svg.hashsalt": "pyro_bmrs"}):
        figure = draw(table)
        figure.savefig(given.out / "cases.svg", metadata={"Date": None})
    print(table.round(3).to_string(index=False), counted.to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
