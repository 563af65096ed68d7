"""One HTML file that says what a run removed, how clear each case was, and what it cost.

Everything is inline (figures as SVG, some lines of style and script): the file can be mailed, printed and
opened without a network. It holds no date and no random name, so the same run gives the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_bmrs.figures import (
    plot_compression_curve,
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_history,
    plot_reliability,
    plot_risk_coverage,
    plot_scores,
    plot_structures,
    plot_widths,
)
from pyro_bmrs.figures.scores import evidence_label, score_label
from pyro_bmrs.files import check_file
from pyro_bmrs.numerals import finite
from pyro_bmrs.quality.diagnosis import FACTS, Diagnosis
from pyro_bmrs.quality.what_if import slider
from pyro_bmrs.reports.page import svg, write_page
from pyro_bmrs.reports.words import (
    decision,
    khat_text,
    methods,
    posterior_warnings,
    removal_warnings,
    rows_of,
    verdict,
    warnings_of,
)
from pyro_bmrs.tables import (
    COST_COLUMNS,
    CURVE_COLUMNS,
    EVALUATION_COLUMNS,
    HISTORY_COLUMNS,
    REMOVAL_COLUMNS,
    TABLE_COLUMNS,
    WIDTH_COLUMNS,
    require_columns,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from pyro_bmrs.fitting import Fit
    from pyro_bmrs.pruning import NetworkPlan

MOST_ROWS = 5000
SHOWN_ROWS = 2000

_COUNTS = ("parameters", "multiply_accumulates")
_COST_NAMES = {
    "parameters": "parameters",
    "multiply_accumulates": "multiply-adds of one example",
    "file_bytes": "file (MB)",
    "peak_bytes_batch_128": "peak memory, batch of 128 (MB)",
    "milliseconds_batch_1_one_thread": "batch of 1, one thread (ms)",
    "milliseconds_batch_128_one_thread": "batch of 128, one thread (ms)",
    "milliseconds_batch_1_all_threads": "batch of 1, all threads (ms)",
    "milliseconds_batch_128_all_threads": "batch of 128, all threads (ms)",
}


def report(
    fit: Fit | None,
    plan: NetworkPlan,
    out: str | os.PathLike[str] = "report.html",
    *,
    costs: pd.DataFrame | None = None,
    curve: pd.DataFrame | None = None,
    evaluation: pd.DataFrame | None = None,
    diagnosis: Diagnosis | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a self-contained HTML page about one run, and beside it the essentials as Markdown.

    Either file is complete or not there: it is written beside ``out`` and moved into place at the end.

    Args:
        fit: the fit, for its ``history``, ``removals`` and ``settings``; None leaves the training out.
        plan: of ``reduce``.
        out: the HTML file to write; its folder is made if need be. The Markdown has the same name with ``.md``.
        costs: None, or what ``plan.costs`` measured: rows such as ``parameters``, columns ``before`` and ``after``.
        curve: None, or accuracy against parameters, with the columns ``parameters_removed`` (0 to 1),
            ``accuracy`` (0 to 1), ``score_threshold`` and ``is_plan`` (the criterion's own stopping point).
        evaluation: None, or a row per network and split, in the order of the work, with the columns
            ``network``, ``split``, ``accuracy`` (0 to 1), ``negative_log_likelihood`` (nats per example) and
            ``parameters``.
        diagnosis: None, or what ``diagnose`` found: k̂, predictions before and after, the curves of other criteria,
            and what other prior log-odds would remove.
        settings: None, or more to print: recipe, data, versions, …

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: a table lacks a column, or ``plan.table`` has no rows. An existing file stays untouched.

    Example:
        >>> import tempfile, torch, pyro_bmrs as bmrs
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), bmrs.MultiplicativeNoise(2), torch.nn.Linear(2, 2))
        >>> model = bmrs.Classifier(net)
        >>> guide = bmrs.AutoTruncatedLogNormal(model)
        >>> _ = guide(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
        >>> plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report(None, plan, f"{folder}/report.html")
        ...     "50.0 % of 2 structures removed" in path.read_text(encoding="utf-8")
        True
    """
    out = Path(out)
    if not hasattr(plan, "widths"):
        raise TypeError(f"plan must be what reduce returned: got {type(plan).__name__}")
    if diagnosis is not None and not hasattr(diagnosis, "tables"):
        raise TypeError(f"diagnosis must be what diagnose found, or None: got {type(diagnosis).__name__}")
    check_file("out", out)
    if out.suffix == ".md":
        raise ValueError(f"out must not end in .md, which is for the Markdown beside it: got {out}")
    widths = plan.widths()
    require_columns("plan.table", plan.table, TABLE_COLUMNS)
    require_columns("plan.widths()", widths, WIDTH_COLUMNS)
    if costs is not None:
        require_columns("costs", costs, COST_COLUMNS)
    if fit is not None:
        require_columns("fit.history", fit.history, HISTORY_COLUMNS)
    if curve is not None:
        require_columns("curve", curve, CURVE_COLUMNS)
    if evaluation is not None:
        require_columns("evaluation", evaluation, EVALUATION_COLUMNS)

    history = None if fit is None or fit.history.empty else fit.history
    curves = None if diagnosis is None else diagnosis.curves
    if curve is None and curves is not None:
        curve = curves[curves["criterion"] == curves["criterion"].iloc[0]]
    units = _shown_units(plan.table, _threshold(plan))
    shown_widths = widths.assign(removed=1 - widths["after"] / widths["before"].where(widths["before"] > 0))
    content = dict(
        title="Reduction report",
        verdict=verdict(history, plan, curve, evaluation, costs),
        warnings=[*removal_warnings(evaluation), *warnings_of(plan, widths), *posterior_warnings(diagnosis)],
        rule=f"{plan.rule}. {decision(plan.rule)}.",
        costs=_costs(costs),
        widths=rows_of(shown_widths, (*WIDTH_COLUMNS, "removed")),
        widths_total=(int(widths["before"].sum()), int(widths["after"].sum())),
        evaluation=None if evaluation is None else rows_of(evaluation, EVALUATION_COLUMNS),
        figures=_figures(fit, history, plan, widths, curve, diagnosis),
        what_if=None
        if diagnosis is None or diagnosis.what_if is None
        else slider(plan, diagnosis.what_if, curve, _parameters_before(plan, diagnosis.what_if, costs)),
        posterior=_posterior(diagnosis),
        quality=None
        if diagnosis is None or diagnosis.quality is None
        else diagnosis.quality.to_dict("records"),
        facts=_facts(diagnosis),
        foreign="" if diagnosis is None else diagnosis.facts.get("out_of_distribution") or "",
        units=_unit_rows(units, plan, diagnosis),
        unit_columns=_unit_columns(plan, diagnosis),
        units_total=len(plan.table),
        methods=methods(fit, plan, diagnosis, settings),
        settings=_settings(fit, plan, settings, diagnosis),
        notes=[] if diagnosis is None else diagnosis.notes,
    )
    content["contents"] = _contents(content)
    return write_page(out, "report", content)


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections that the page has, by anchor."""
    figures = content["figures"]
    sections = [
        ("before-after", "before and after", True),
        ("structures", "map", True),
        ("decision", "scores", True),
        ("what-if", "what if", content["what_if"]),
        ("posterior", "posterior", content["posterior"]),
        ("forest", "by layer", figures.get("forest")),
        ("predictions", "predictions", content["quality"]),
        ("history", "training", figures.get("history")),
        ("units", "every unit", True),
        ("methods", "methods", True),
        ("settings", "settings", True),
    ]
    return [(anchor, name) for anchor, name, there in sections if there]


def _figures(
    fit: Fit | None,
    history: pd.DataFrame | None,
    plan: NetworkPlan,
    widths: pd.DataFrame,
    curve: pd.DataFrame | None,
    diagnosis: Diagnosis | None,
) -> dict[str, Markup | None]:
    """The drawings by name; None for what there is nothing to draw of."""
    found = diagnosis.tables() if diagnosis is not None else {}
    drawn: dict[str, Callable[[], Figure] | None] = {
        "structures": lambda: plot_structures(plan),
        "scores": lambda: plot_scores(plan),
        "widths": lambda: plot_widths(widths),
        "forest": (lambda: plot_forest(plan)) if np.isfinite(plan.table["loc"].astype(float)).any() else None,
        "curve": None,
        "history": None,
        "reliability": None,
        "risk": None,
        "entropy": None,
    }
    # a regression has losses, and no accuracy to draw
    if "curves" in found and found["curves"]["accuracy"].notna().any():
        drawn["curve"] = lambda: plot_criteria(found["curves"])
    elif curve is not None and curve["accuracy"].notna().any():
        drawn["curve"] = lambda: plot_compression_curve(curve)
    if history is not None:
        drawn["history"] = lambda: plot_history(history, _removals(fit, plan))
    if "reliability" in found:
        drawn["reliability"] = lambda: plot_reliability(_chosen(found["reliability"]))
        drawn["risk"] = lambda: plot_risk_coverage(_chosen(found["risk_coverage"]))
    if "entropy" in found and found["entropy"]["data"].nunique() > 1:
        drawn["entropy"] = lambda: plot_entropy(found["entropy"])
    return {name: None if draw is None else svg(name, draw) for name, draw in drawn.items()}


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Before and after, by draws where there are any: more lines than these hide each other."""
    by_draws = (table["prediction"] == "draws") | (table["network"] == "fine-tuned")
    return table[by_draws] if (table["prediction"] == "draws").any() else table


def _removals(fit: Fit | None, plan: NetworkPlan) -> pd.DataFrame | None:
    """What went in the fit, as it noted it, and by this plan after the fit's last epoch."""
    if fit is None or "removed_in_fit" not in plan.table:
        return None
    in_fit = fit.removals.assign(phase="fit")
    epochs = int((fit.history["phase"] == "fit").sum())
    now = plan.table[plan.table["removed"] & ~plan.table["removed_in_fit"]].assign(
        phase="reduce", epoch=epochs
    )
    parts = [part[list(REMOVAL_COLUMNS)] for part in (in_fit, now) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else None


def _posterior(diagnosis: Diagnosis | None) -> dict[str, Any] | None:
    if diagnosis is None or diagnosis.khat is None or diagnosis.elbo is None:
        return None
    rows = []
    for row in diagnosis.khat.to_dict("records"):
        verdict = "reliable" if row["reliable"] else "not reliable"
        if math.isnan(row["khat"]):
            verdict = "no posterior to compare with"
        if row["khat"] == -math.inf:
            verdict = "exact: all weights are equal"
        rows.append({**row, "shown": khat_text(row["khat"]), "verdict": verdict})
    return {
        "khat": rows,
        "elbo": diagnosis.elbo.to_dict("records"),
        "loo": None if diagnosis.loo is None else diagnosis.loo.to_dict("records")[0],
    }


def _facts(diagnosis: Diagnosis | None) -> dict[str, Any]:
    """What the tables are of; None for what is not known of a diagnosis that was put together by hand."""
    return {**dict.fromkeys(FACTS), **({} if diagnosis is None else diagnosis.facts)}


def _unit_columns(plan: NetworkPlan, diagnosis: Diagnosis | None) -> list[tuple[str, str, str]]:
    columns = [
        ("layer", "layer", "text"),
        ("unit", "unit", ".0f"),
        ("decision", "decision", "text"),
        ("loc", "loc of log θ", ".4g"),
        ("scale", "scale of log θ", ".4g"),
        ("mean", "E[θ]", ".4g"),
        ("snr", "SNR", ".4g"),
    ]
    if diagnosis is not None and diagnosis.contraction is not None:
        columns.append(("contraction", "contraction (nats)", ".4g"))
    return [
        *columns,
        ("score", score_label(plan.rule), ".4g"),
        ("log_evidence_change", evidence_label(plan.rule.kl_weight), ".4g"),
    ]


def _unit_rows(units: pd.DataFrame, plan: NetworkPlan, diagnosis: Diagnosis | None) -> list[dict[str, Any]]:
    """The table's rows with contraction, and the decision in words."""
    contraction: dict[tuple[str, int], float] = {}
    if diagnosis is not None and diagnosis.contraction is not None:
        found = diagnosis.contraction
        contraction = dict(
            zip(zip(found["site"], found["unit"], strict=True), found["contraction"], strict=True)
        )
    in_fit = units["removed_in_fit"] if "removed_in_fit" in units else pd.Series(False, units.index)
    rule = plan.rule
    held = "kept by the floor" if rule.round_to is None else "kept by floor or rounding"
    bar = math.inf if rule.threshold is None else rule.threshold
    rows = rows_of(units.assign(removed_in_fit=in_fit), (*TABLE_COLUMNS, "removed_in_fit"))
    for row in rows:
        row["gone"] = bool(row["removed"])
        row["contraction"] = contraction.get((row["layer"], row["unit"]), math.nan)
        score = finite(row["score"])
        if row["removed"]:
            row["decision"] = "removed in the fit" if row["removed_in_fit"] else "removed"
        else:
            row["decision"] = "kept" if score is None or score < bar else held
    return rows


def _costs(costs: pd.DataFrame | None) -> list[dict[str, Any]]:
    rows = []
    for name, row in () if costs is None else costs.iterrows():
        before, after = finite(row["before"]), finite(row["after"])
        if before is None and after is None:
            continue  # it would have taken too long to measure
        if "bytes" in str(name):
            before, after = (None if value is None else value / 1e6 for value in (before, after))
        rows.append(
            {
                "name": _COST_NAMES.get(str(name), str(name).replace("_", " ")),
                "before": before,
                "after": after,
                "digits": ",.0f" if name in _COUNTS else ",.3f",
                "removed": 1 - after / before if before and after is not None else None,
                "ratio": before / after if before is not None and after else None,
            }
        )
    return rows


def _threshold(plan: NetworkPlan) -> float:
    """Of the rule; 0 where a search decided, or the threshold is infinite."""
    threshold = plan.rule.threshold
    return 0.0 if threshold is None or math.isinf(threshold) else threshold


def _parameters_before(plan: NetworkPlan, changes: pd.DataFrame, costs: pd.DataFrame | None) -> int:
    """Of the full network; of what a fit has left of it where the plan, read from disk, knows no other."""
    if costs is not None and "parameters" in costs.index:
        return int(costs["before"]["parameters"])
    try:
        return plan.parameters_before()
    except ValueError:
        return int(changes["parameters"].max())


def _shown_units(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """All structures, or of very many those whose score is closest to the threshold, in the order of the table."""
    if len(table) <= MOST_ROWS:
        return table
    distance = np.abs(table["score"].to_numpy(dtype=float, na_value=np.nan) - threshold)
    closest = np.argsort(distance, kind="stable")[:SHOWN_ROWS]
    return table.iloc[np.sort(closest)]


def _settings(
    fit: Fit | None, plan: NetworkPlan, settings: Mapping[str, Any] | None, diagnosis: Diagnosis | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Run", settings or {}),
        ("Fit", {} if fit is None else dict(fit.settings)),
        ("Rule", asdict(plan.rule)),
        ("Diagnosis", {} if diagnosis is None else diagnosis.facts),
    ]
    return [(title, list(_flat(values))) for title, values in groups if values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.6g}" if math.isfinite(value) else "–"
        else:
            yield f"{prefix}{name}", "–" if value is None else str(value)
