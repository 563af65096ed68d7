"""Tables made by hand, and every figure that is drawn from one."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd

from pyro_bmrs import Rule
from pyro_bmrs.figures import (
    plot_compression_curve,
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_history,
    plot_reliability,
    plot_removal_path,
    plot_risk_coverage,
    plot_runs,
    plot_scores,
    plot_structures,
    plot_widths,
)
from pyro_bmrs.tables import (
    CRITERIA_COLUMNS,
    CURVE_COLUMNS,
    ENTROPY_COLUMNS,
    HISTORY_COLUMNS,
    PATH_COLUMNS,
    RELIABILITY_COLUMNS,
    REMOVAL_COLUMNS,
    RISK_COLUMNS,
    RUN_COLUMNS,
    TABLE_COLUMNS,
    WIDTH_COLUMNS,
)


def units(layers: dict[str, int]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    table = pd.DataFrame({"layer": np.repeat(list(layers), list(layers.values()))})
    idle = random.random(len(table)) < 0.6
    return table.assign(
        unit=table.groupby("layer").cumcount(),
        loc=np.where(idle, random.uniform(-25, -8, len(table)), random.uniform(-2, 0.3, len(table))),
        scale=np.where(idle, random.uniform(1, 50, len(table)), random.uniform(0.02, 0.5, len(table))),
        mean=0.5,
        snr=1.0,
        score=np.where(idle, 1.0, -50.0),
        log_evidence_change=0.0,
        removed=idle,
    )


def bins(networks: list[str], predictions: list[str] = ["mean"]) -> pd.DataFrame:  # noqa: B006
    lower = np.arange(10) / 10
    return pd.concat(
        pd.DataFrame(
            {
                "network": network,
                "prediction": prediction,
                "lower": lower,
                "upper": lower + 0.1,
                "count": [0, 0, 3, 9, 10, 28, 50, 100, 800, 9000],
                "confidence": [math.nan, math.nan, *(lower[2:] + 0.06)],
                "accuracy": [math.nan, math.nan, *(lower[2:] + 0.02)],
            }
        )
        for network in networks
        for prediction in predictions
    )


def curves(criteria: list[str]) -> pd.DataFrame:
    removed = np.linspace(0, 0.99, 12)
    tables = [
        pd.DataFrame(
            {
                "criterion": criterion,
                "parameters_removed": removed,
                "accuracy": 0.99 - 0.01 * index * removed - 0.6 * removed**20,
                "loss": np.linspace(0.1, 1.0, 12),
                "score_threshold": np.linspace(5, -500, 12),
                "is_plan": np.arange(12) == 10 - index,
            }
        )
        for index, criterion in enumerate(criteria)
    ]
    return pd.concat(tables, ignore_index=True).sample(frac=1, random_state=0)


def coverages(networks: list[str]) -> pd.DataFrame:
    coverage = np.linspace(0.01, 1, 100)
    tables = [
        {"network": network, "prediction": "mean", "coverage": coverage, "risk": 0.02 * coverage ** (4 + k)}
        for k, network in enumerate(networks)
    ]
    return pd.concat(map(pd.DataFrame, tables)).sample(frac=1, random_state=0)


def many_runs(names: list[str]) -> pd.DataFrame:
    count = np.arange(len(names))
    return pd.DataFrame({"run": names, "parameters": 60000 // (1 + count), "accuracy": 0.99 - 0.001 * count})


def entropies(data: list[str]) -> pd.DataFrame:
    random = np.random.default_rng(0)
    tables = [{"data": name, "entropy": random.gamma(2 + 3 * k, 0.1, 400)} for k, name in enumerate(data)]
    return pd.concat(map(pd.DataFrame, tables), ignore_index=True)


def history() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "phase": ["fit"] * 20 + ["fine-tune"] * 5,
            "epoch": [*range(1, 21), *range(1, 6)],
            "loss": 1.0,
            "log_likelihood": -0.9,
            "kl": 100.0,
            "validation_loss": 0.9,
            "validation_accuracy": 0.98,
            "kept": np.linspace(200, 40, 25).round(),
            "seconds": 1.0,
        }
    )


def removals(counts: dict[tuple[str, int], int], layer: str = "fc1") -> pd.DataFrame:
    rows = [
        {"phase": phase, "epoch": epoch, "layer": layer, "unit": unit}
        for (phase, epoch), count in counts.items()
        for unit in range(count)
    ]
    return pd.DataFrame(rows, columns=REMOVAL_COLUMNS)


def plan(table):
    return SimpleNamespace(table=table, rule=Rule(criterion="BMRS_N", prior_log_odds=0.0))


def forest(table):
    return plot_forest(plan(table))


def same_layers(names):
    return units(dict.fromkeys(names, 7))


def paths() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "parameters": [90, 70, 40, 20], "total_loss_rise": [1.0, 5.0, 30.0, 400.0],
            "measured_loss_rise": [math.nan, 6.0, math.nan, 900.0], "total_evidence_change": [20.0, 60.0, 10.0, -500.0],
        }
    )  # fmt: skip


# Of each figure: how it is drawn from a table, what it calls the table, the columns it needs, and a table in
# which the user's texts are as told.
FIGURES: dict[str, tuple[Callable, str, tuple[str, ...], Callable]] = {
    "structures": (lambda table: plot_structures(plan(table)), "plan.table", TABLE_COLUMNS, same_layers),
    "scores": (lambda table: plot_scores(plan(table)), "plan.table", TABLE_COLUMNS, same_layers),
    "forest": (forest, "plan.table", TABLE_COLUMNS, same_layers),
    "reliability": (
        plot_reliability, "reliability", RELIABILITY_COLUMNS,
        lambda names: bins(names[:3], [names[-1], "draws"]),
    ),
    "removal path": (lambda table: plot_removal_path(table, 2), "plan.path", PATH_COLUMNS, lambda names: paths()),
    "widths": (
        plot_widths, "widths", WIDTH_COLUMNS,
        lambda names: pd.DataFrame({"layer": names, "before": 20, "after": np.arange(len(names))}),
    ),
    "compression curve": (
        plot_compression_curve, "curve", CURVE_COLUMNS, lambda names: curves(names[:1]).drop(columns="criterion"),
    ),
    "criteria": (plot_criteria, "curves", CRITERIA_COLUMNS, curves),
    "risk_coverage": (plot_risk_coverage, "risk_coverage", RISK_COLUMNS, coverages),
    "runs": (plot_runs, "runs", RUN_COLUMNS, many_runs),
    "entropy": (
        plot_entropy, "entropies", ENTROPY_COLUMNS, lambda names: entropies(names[-4:]),
    ),
    "history": (plot_history, "fit.history", HISTORY_COLUMNS, lambda names: history()),
    "removals": (
        lambda table: plot_history(history(), table), "removals", REMOVAL_COLUMNS,
        lambda names: pd.concat([removals({("fit", 3): 5, ("reduce", 20): 7}, name) for name in names]),
    ),
}  # fmt: skip
