"""One HTML file that says what a plan removes, how clear each case is, and what it costs.

Everything is inline: figures as SVG, some lines of style and script. The file can be mailed, printed and opened without
a network. It holds no date and no random name, so the same run gives the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_bmrs.arguments import check
from pyro_bmrs.figures import (
    plot_compression_curve,
    plot_criteria,
    plot_entropy,
    plot_forest,
    plot_frontier,
    plot_history,
    plot_reliability,
    plot_removal_path,
    plot_risk_coverage,
    plot_scores,
    plot_structures,
    plot_widths,
)
from pyro_bmrs.figures.scores import evidence_label, finite_threshold, score_label
from pyro_bmrs.files import check_file
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.numerals import finite
from pyro_bmrs.quality.diagnosis import FACTS, Diagnosis
from pyro_bmrs.quality.frontier import Frontier
from pyro_bmrs.reports.page import svg, write_page
from pyro_bmrs.reports.sizes import slider
from pyro_bmrs.reports.words import (
    asked,
    decision,
    methods,
    posterior_warnings,
    recommendation,
    removal_warnings,
    verdict,
    warnings_of,
)
from pyro_bmrs.tables import (
    CALIBRATION_COLUMNS,
    COST_COLUMNS,
    CURVE_COLUMNS,
    EVALUATION_COLUMNS,
    HISTORY_COLUMNS,
    REGRESSION_COLUMNS,
    REMOVAL_COLUMNS,
    TABLE_COLUMNS,
    require_columns,
)

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from pyro_bmrs.fitting import Fit
    from pyro_bmrs.pruning import NetworkPlan, Rule

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
    frontier: Frontier | None = None,
    settings: Mapping[str, Any] | None = None,
    command: str = "plan.within(parameters={})",
    feature_names: Sequence[str] = (),
    pending: Collection[str] = (),
) -> Path:
    """Write a self-contained HTML page about one plan, and beside it the essentials as Markdown.

    Each file is whole or not there.

    Args:
        fit: the fit, for its ``history``, ``removals`` and ``settings``; None leaves the training out.
        plan: of ``reduce``.
        out: the HTML file to write; its folder is made if need be. The Markdown has the same name with ``.md``.
        costs: None, or what ``plan.costs`` measured: rows such as ``parameters``, columns ``before`` and ``after``.
        curve: None, or what ``compression_curve`` returned: accuracy against parameters removed.
        evaluation: None, or a row per network and split, in the order of the work, with the columns
            ``network``, ``split``, ``accuracy`` (0 to 1), ``negative_log_likelihood`` (nats per example) and
            ``parameters``; maybe ``accuracy_error`` and ``standard_error``, of the two measures; of a regression, whose
            accuracy is NaN, ``rmse``, ``rmse_error``, ``mae``, ``r2``, ``coverage`` and ``width`` as of
            ``regression_quality``; of a classifier ``expected_calibration_error``, ``temperature``, and with it
            ``calibrated_error`` and ``calibrated_negative_log_likelihood``. The last row is the network that came
            out; one called "full, trained as long" is what it is compared with.
        diagnosis: None, or what ``diagnose`` found: k̂, predictions before and after, the curves of other criteria.
        frontier: None, or what ``frontier`` found of this plan: networks of other sizes, under a slider.
        settings: None, or more to print: recipe, data, versions, …
        command: to show beside another size; ``{}`` stands for its number of parameters.
        feature_names: of the network's inputs, for the structures of an `InputSelection` of as many features.
        pending: what is still being measured, for the page to say so.

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
    check(hasattr(plan, "widths"), "plan", "what reduce returned", type(plan), TypeError)
    known = diagnosis is None or hasattr(diagnosis, "tables")
    check(known, "diagnosis", "what diagnose found, or None", type(diagnosis), TypeError)
    known = isinstance(frontier, Frontier | None)
    check(known, "frontier", "what frontier found, or None", type(frontier), TypeError)
    check_file("out", out)
    if out.suffix == ".md":
        raise ValueError(f"out must not end in .md, which is for the Markdown beside it: got {out}")
    widths = plan.widths()
    for name, table, columns in (
        ("plan.table", plan.table, TABLE_COLUMNS),
        ("costs", costs, COST_COLUMNS),
        ("fit.history", None if fit is None else fit.history, HISTORY_COLUMNS),
        ("curve", curve, CURVE_COLUMNS),
        ("evaluation", evaluation, EVALUATION_COLUMNS),
    ):
        if table is not None:
            require_columns(name, table, columns)

    history = None if fit is None else fit.history[fit.history["phase"] != "curvature"]
    history = None if history is None or history.empty else history
    if diagnosis is None:
        diagnosis = Diagnosis()
    settings = settings or {}
    if curve is None and diagnosis.curves is not None:
        curve = diagnosis.curves[diagnosis.curves["criterion"] == diagnosis.curves["criterion"].iloc[0]]
    kinds = plan.kinds()
    named = {
        layer: [*feature_names]
        for layer, before in zip(map(str, widths["layer"]), widths["before"], strict=True)
        if feature_names and kinds.get(layer) == InputSelection.__name__ and before == len(feature_names)
    }
    structures = _structures(plan, diagnosis)
    structures["name"] = [
        named[layer][int(unit)] if layer in named else ""
        for layer, unit in zip(map(str, structures["layer"]), structures["unit"], strict=True)
    ]
    shown_widths = widths.assign(
        kind=[kinds.get(layer, "") for layer in widths["layer"]],
        removed=1 - widths["after"] / widths["before"].where(widths["before"] > 0),
    )
    content: dict[str, Any] = dict(
        title="Reduction report",
        verdict=verdict(history, plan, curve, evaluation, costs),
        warnings=[*removal_warnings(evaluation), *warnings_of(plan), *posterior_warnings(diagnosis.khat)],
        asked=asked(plan.rule),
        recommendation=recommendation(plan, evaluation, _parameters(costs, "after"), command),
        pending=", ".join(pending),
        rule=f"{plan.rule}. {decision(plan.rule)}.",
        threshold=finite_threshold(plan.rule),
        costs=[] if costs is None else _costs(costs),
        widths=shown_widths.to_dict("records"),
        inputs=[_inputs(plan, layer, names) for layer, names in named.items()],
        widths_total=(int(widths["before"].sum()), int(widths["after"].sum())),
        evaluation=[] if evaluation is None else _evaluation(evaluation),
        by_error=evaluation is not None and "rmse" in evaluation,
        figures=_figures(fit, history, plan, curve, diagnosis, frontier),
        sizes=None
        if frontier is None
        else slider(frontier, _parameters_before(frontier, costs), command, named),
        posterior=_posterior(diagnosis),
        quality=[] if diagnosis.quality is None else diagnosis.quality.to_dict("records"),
        regression=[] if diagnosis.regression is None else diagnosis.regression.to_dict("records"),
        # None for what is not known of a diagnosis that was put together by hand
        facts={**dict.fromkeys(FACTS), **diagnosis.facts},
        structures=structures.to_dict("records"),
        structure_columns=_structure_columns(plan.rule, contraction="contraction" in structures),
        structures_total=len(plan.table),
        methods=methods(fit, plan, diagnosis, settings, evaluation),
        settings=_settings(fit, plan, settings, diagnosis),
        notes=diagnosis.notes,
    )
    content["contents"] = _contents(content)
    return write_page(out, "report", content)


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections that the page has, by anchor."""
    figures = content["figures"]
    sections = [
        ("before-after", "before and after", True),
        ("map", "map", True),
        ("decision", "scores", True),
        ("sizes", "other sizes", content["sizes"]),
        ("posterior", "posterior", content["posterior"]),
        ("forest", "by layer", figures["forest"]),
        ("predictions", "predictions", content["quality"] or content["regression"]),
        ("history", "training", figures["history"]),
        ("structures", "every structure", True),
        ("methods", "methods", True),
        ("settings", "settings", True),
    ]
    return [(anchor, name) for anchor, name, there in sections if there]


def _figures(
    fit: Fit | None,
    history: pd.DataFrame | None,
    plan: NetworkPlan,
    curve: pd.DataFrame | None,
    found: Diagnosis,
    sizes: Frontier | None,
) -> dict[str, Markup | None]:
    """The drawings by name; None where there is nothing to draw."""
    curves = curve if found.curves is None else found.curves
    draw_curve = plot_compression_curve if found.curves is None else plot_criteria
    entropy = found.entropy if found.entropy is not None and found.entropy["data"].nunique() > 1 else None
    drawings: dict[str, tuple[Callable[..., Figure], Any]] = {
        "structures": (plot_structures, plan),
        "scores": (plot_scores, plan),
        "widths": (plot_widths, plan.widths()),
        "forest": (plot_forest, plan if np.isfinite(plan.table["loc"].astype(float)).any() else None),
        "curve": (
            draw_curve,
            curves if curves is not None and curves[["accuracy", "loss"]].notna().any(axis=None) else None,
        ),
        "frontier": (lambda sizes: plot_frontier(sizes.table, sizes.budget), sizes),
        "path": (
            lambda found: plot_removal_path(found.path, found.steps),
            plan if len(getattr(plan, "path", ())) else None,
        ),
        "history": (lambda table: plot_history(table, _removals(fit, plan)), history),
        "reliability": (plot_reliability, _chosen(found.reliability)),
        "risk": (plot_risk_coverage, _chosen(found.risk_coverage)),
        "entropy": (plot_entropy, entropy),
    }
    return {
        name: None if shown is None else svg(name, draw, shown) for name, (draw, shown) in drawings.items()
    }


def _chosen(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Before and after, from draws where there are any: more lines than these hide each other."""
    if table is None or not (table["prediction"] == "draws").any():
        return table
    return table[(table["prediction"] == "draws") | (table["network"] == "fine-tuned")]


def _removals(fit: Fit | None, plan: NetworkPlan) -> pd.DataFrame | None:
    """What was removed in the fit, as it noted it, and by this plan after the fit's last epoch."""
    if fit is None or "removed_in_fit" not in plan.table:
        return None
    in_fit = fit.removals.assign(phase="fit")
    epochs = int((fit.history["phase"] == "fit").sum())
    now = plan.table[plan.table["removed"] & ~plan.table["removed_in_fit"]].assign(
        phase="reduce", epoch=epochs
    )
    parts = [part[[*REMOVAL_COLUMNS]] for part in (in_fit, now) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else None


def _posterior(diagnosis: Diagnosis) -> dict[str, Any] | None:
    if diagnosis.khat is None or diagnosis.elbo is None:
        return None
    rows = diagnosis.khat.to_dict("records")
    for row in rows:
        row["verdict"] = "reliable" if row["reliable"] else "not reliable"
        if math.isnan(row["khat"]):
            row["verdict"] = "no posterior to compare with"
        if row["khat"] == -math.inf:
            row["verdict"] = "exact: all weights are equal"
    return {
        "khat": rows,
        "elbo": diagnosis.elbo.to_dict("records"),
        "loo": None if diagnosis.loo is None else diagnosis.loo.to_dict("records")[0],
    }


def _structure_columns(rule: Rule, *, contraction: bool) -> list[tuple[str, str, str]]:
    of_theta = [
        ("loc", "loc of log θ", ".4g"),
        ("scale", "scale of log θ", ".4g"),
        ("mean", "E[θ]", ".4g"),
        ("snr", "SNR", ".4g"),
    ]
    return [
        ("layer", "layer", "text"),
        ("unit", "structure", ".0f"),
        ("name", "input", "text"),
        ("decision", "decision", "text"),
        *([] if rule.is_path else of_theta),  # a path is of weights
        *([("contraction", "contraction (nats)", ".4g")] if contraction else []),
        ("score", score_label(rule), ".4g"),
        ("log_evidence_change", evidence_label(rule.kl_weight), ".4g"),
    ]


def _structures(plan: NetworkPlan, diagnosis: Diagnosis) -> pd.DataFrame:
    """The rows of the table that are shown, with contraction where it is known, and the decision in words."""
    table, rule = plan.table, plan.rule
    if len(table) > MOST_ROWS:
        distance = (table["score"] - (finite_threshold(rule) or 0.0)).abs()
        table = table.loc[distance.sort_values(kind="stable").index[:SHOWN_ROWS].sort_values()]
    if diagnosis.contraction is not None:
        told = diagnosis.contraction.rename(columns={"site": "layer"})[["layer", "unit", "contraction"]]
        table = table.merge(told, how="left", on=["layer", "unit"])
    removed = table["removed"].astype(bool)
    wanted = table["score"] >= (math.inf if rule.threshold is None else rule.threshold)
    held = "kept by the floor" if rule.round_to is None else "kept by floor or rounding"
    cases = [removed & table.get("removed_in_fit", False), removed, wanted]
    words = np.select(cases, ["removed in the fit", "removed", held], "kept")
    return table.assign(decision=words, gone=removed)


def _inputs(plan: NetworkPlan, layer: str, names: Sequence[str]) -> str:
    """Which inputs are kept and removed, by name, those with the most evidence for them first."""
    rows = plan.table[plan.table["layer"] == layer].sort_values("score", kind="stable")
    every = list(zip(rows["unit"].astype(int), rows["removed"].astype(bool), strict=True))
    found = {
        said: [names[unit] for unit, removed in every if removed == gone]
        for said, gone in (("kept", False), ("removed", True))
    }
    return "; ".join(f"{said}: {', '.join(some)}" for said, some in found.items() if some)


def _evaluation(table: pd.DataFrame) -> list[dict[str, Any]]:
    optional = ("accuracy_error", "standard_error", *CALIBRATION_COLUMNS, *REGRESSION_COLUMNS)
    return table.assign(**{name: math.nan for name in optional if name not in table}).to_dict("records")  # type: ignore[return-value]


def _costs(costs: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for name, row in costs.iterrows():
        before, after = finite(row["before"]), finite(row["after"])
        if before is None and after is None:
            continue  # it would have taken too long to measure
        size = 1e6 if "bytes" in str(name) else 1.0
        before, after = (None if value is None else value / size for value in (before, after))
        rows.append(
            {
                "name": _COST_NAMES.get(str(name), str(name).replace("_", " ")),
                "before": before,
                "after": after,
                "digits": ",.0f" if name in _COUNTS else ",.3f",
                "removed": 1 - after / before if before and after is not None else None,
                # of a time
                "error": finite(row.get("error")) if "milliseconds" in str(name) else None,
                "ratio": before / after if before is not None and after else None,
            }
        )
    return rows


def _parameters(costs: pd.DataFrame | None, column: str) -> int | None:
    known = costs is not None and "parameters" in costs.index
    return int(costs[column]["parameters"]) if known else None  # type: ignore[index]


def _parameters_before(found: Frontier, costs: pd.DataFrame | None) -> int:
    """Of the full network; without its costs, of the largest of the frontier, of which a fit may have left less."""
    known = _parameters(costs, "before")
    return int(found.table.parameters.max()) if known is None else known


def _settings(
    fit: Fit | None, plan: NetworkPlan, settings: Mapping[str, Any], diagnosis: Diagnosis
) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Run", settings),
        ("Fit", {} if fit is None else dict(fit.settings)),
        ("Rule", asdict(plan.rule)),
        ("Diagnosis", diagnosis.facts),
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
