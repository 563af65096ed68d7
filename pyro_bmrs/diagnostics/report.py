"""One HTML file that says what a run removed, how clear each case was, and what it cost.

Everything is inline (figures as SVG, a few lines of style and script): the file can be mailed, printed and
opened without a network. It holds no date and no random name, so the same run gives the same bytes.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_bmrs.diagnostics.plots import (
    CURVE_COLUMNS,
    HISTORY_COLUMNS,
    TABLE_COLUMNS,
    evidence_label,
    plot_compression_curve,
    plot_history,
    plot_scores,
    plot_structures,
    require_columns,
    score_label,
)
from pyro_bmrs.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from pyro_bmrs.fitting import Fit
    from pyro_bmrs.reduction import Reduction

WIDTH_COLUMNS = ("layer", "before", "after")
COST_COLUMNS = ("before", "after")
EVALUATION_COLUMNS = ("network", "split", "accuracy", "negative_log_likelihood", "parameters")

MOST_ROWS = 5000
SHOWN_ROWS = 2000
# Scores this close to zero (criterion's unit) were decided by next to nothing.
NARROW = 0.1

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
    plan: Reduction,
    out: str | os.PathLike[str] = "report.html",
    *,
    curve: pd.DataFrame | None = None,
    evaluation: pd.DataFrame | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a self-contained HTML page about one run.

    The page is complete or not there: it is written beside ``out`` and moved into place at the end.

    Args:
        fit: the fit, for its ``history`` and ``settings``; None leaves the training out.
        plan: the reduction, for its ``table``, ``widths()``, ``costs``, ``criterion`` and ``kl_weight``.
        out: the file to write; its folder is made if need be.
        curve: None, or accuracy against parameters, with the columns ``parameters_removed`` (0 to 1),
            ``accuracy`` (0 to 1), ``score_threshold`` and ``is_plan`` (the criterion's own stopping point).
        evaluation: None, or a row per network and split, in the order of the work, with the columns
            ``network``, ``split``, ``accuracy`` (0 to 1), ``negative_log_likelihood`` (nats per example) and
            ``parameters``.
        settings: None, or more to print: recipe, data, versions, …

    Returns:
        The path of the file written.

    Raises:
        ValueError: a table lacks a column, or ``plan.table`` has no rows. An existing file stays untouched.

    Example:
        >>> import pandas as pd, tempfile
        >>> from types import SimpleNamespace
        >>> table = pd.DataFrame({
        ...     "layer": "fc1", "unit": [0, 1], "loc": [-0.1, -15.0], "scale": [0.1, 3.0],
        ...     "mean": [0.9, 1e-4], "snr": [9.0, 0.1], "score": [-90.0, 2.0],
        ...     "log_evidence_change": [-91.0, 1.0], "removed": [False, True],
        ... })
        >>> plan = SimpleNamespace(
        ...     table=table, criterion="BMRS_N()", kl_weight=1.0, costs=None,
        ...     widths=lambda: pd.DataFrame({"layer": ["fc1"], "before": [2], "after": [1]}),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report(None, plan, f"{folder}/report.html")
        ...     "50.0 % of 2 units removed" in path.read_text(encoding="utf-8")
        True
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    widths = plan.widths()
    require_columns("plan.table", plan.table, TABLE_COLUMNS)
    require_columns("plan.widths()", widths, WIDTH_COLUMNS)
    if plan.costs is not None:
        require_columns("plan.costs", plan.costs, COST_COLUMNS)
    if fit is not None:
        require_columns("fit.history", fit.history, HISTORY_COLUMNS)
    if curve is not None:
        require_columns("curve", curve, CURVE_COLUMNS)
    if evaluation is not None:
        require_columns("evaluation", evaluation, EVALUATION_COLUMNS)

    environment = Environment(
        loader=PackageLoader("pyro_bmrs.diagnostics"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, percent=_percent)
    history = None if fit is None or fit.history.empty else fit.history
    units = _shown_units(plan.table)
    page = environment.get_template("report.html.j2").render(
        verdict=_verdict(history, plan, curve, evaluation),
        warnings=_warnings(plan, widths),
        criterion=str(plan.criterion),
        costs=_costs(plan.costs),
        widths=_rows(widths, WIDTH_COLUMNS),
        widths_total=(int(widths["before"].sum()), int(widths["after"].sum())),
        evaluation=None if evaluation is None else _rows(evaluation, EVALUATION_COLUMNS),
        structures=_svg("structures", lambda: plot_structures(plan)),
        curve=None if curve is None else _svg("curve", lambda: plot_compression_curve(curve)),
        scores=_svg("scores", lambda: plot_scores(plan)),
        history=None if history is None else _svg("history", lambda: plot_history(history)),
        units=_rows(units, TABLE_COLUMNS),
        units_total=len(plan.table),
        evidence_label=evidence_label(plan.kl_weight),
        score_label=score_label(plan),
        settings=_settings(fit, plan, settings),
    )
    # A lone surrogate in a user's text has no UTF-8; a question mark is better than no report.
    return write_atomically(Path(out), lambda beside: beside.write_bytes(page.encode("utf-8", "replace")))


def _svg(name: str, draw: Callable[[], Figure]) -> Markup:
    """Draw a figure as an SVG element whose identifiers are unique in the page."""
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"pyro_bmrs {name}"}), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the reader's browser.
        warnings.filterwarnings("ignore", message="Glyph")
        # No metadata: it would hold the date, and addresses.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw().savefig(buffer, format="svg", dpi=200, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]

    def prefixed(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])

    # Only within tags: in the text "<" and ">" are escaped, so no layer's name can look like one.
    return Markup(re.sub(r"<[^>]*>", prefixed, drawing))


def _verdict(
    history: pd.DataFrame | None,
    plan: Reduction,
    curve: pd.DataFrame | None,
    evaluation: pd.DataFrame | None,
) -> str:
    """Say in one sentence how much went and what is left of the accuracy."""
    removed = f"{_percent(plan.table['removed'].astype(bool).mean())} of {len(plan.table):,} units removed"
    if plan.costs is not None and "parameters" in plan.costs.index:
        before = _finite(plan.costs["before"]["parameters"])
        after = _finite(plan.costs["after"]["parameters"])
        if before and after is not None:
            removed = f"{_percent(1 - after / before)} of {before:,.0f} parameters removed"

    stops = None if curve is None else curve[curve["is_plan"].astype(bool)]
    if evaluation is not None and len(evaluation):
        splits = evaluation["split"].astype(str)
        split = "test" if (splits == "test").any() else splits.iloc[-1]
        rows = _rows(evaluation[splits == split], EVALUATION_COLUMNS)
        rows = [row for row in rows if _finite(row["accuracy"]) is not None]
        if rows:
            first, last = rows[0], rows[-1]
            accuracy = f"{split} accuracy {_percent(last['accuracy'])} ({last['network']})"
            if len(rows) > 1:
                accuracy += f", from {_percent(first['accuracy'])} ({first['network']})"
            return f"{removed}; {accuracy}."
    if history is not None:
        measured = history["validation_accuracy"].dropna()
        if len(measured):
            return f"{removed}; validation accuracy {_percent(measured.iloc[-1])} after the last epoch."
    if stops is not None and len(stops) and _finite(stops["accuracy"].iloc[0]) is not None:
        return f"{removed}; accuracy {_percent(stops['accuracy'].iloc[0])}."
    return f"{removed}."


def _warnings(plan: Reduction, widths: pd.DataFrame) -> list[str]:
    found = []
    if plan.kl_weight != 1:
        found.append(
            f"The posterior was fitted with a KL weight of w = {_number(plan.kl_weight)}, so "
            "ΔF is the evidence of the tempered model p(y|θ)^(1/w), not of the model itself."
        )
    table = plan.table
    removed = table["removed"].astype(bool)
    for row in _rows(widths, WIDTH_COLUMNS):
        if row["after"] == 1:
            held = bool(((table["layer"] == row["layer"]) & ~removed & (table["score"] >= 0)).any())
            found.append(
                f"Layer {row['layer']} is at its floor of 1 unit (of {row['before']:,})"
                + (
                    "; its last unit has a score of 0 or more and stays only because of the floor."
                    if held
                    else "."
                )
            )
    narrow = int((removed & (table["score"].abs() <= NARROW)).sum())
    if narrow:
        found.append(
            f"{narrow:,} of {int(removed.sum()):,} removed units have a score within {NARROW} of zero: "
            "a small change of the criterion or the seed would have kept them."
        )
    unknown = int((~np.isfinite(table["score"].to_numpy(dtype=float, na_value=np.nan))).sum())
    if unknown:
        found.append(f"{unknown:,} of {len(table):,} units: the score is not a finite number.")
    return found


def _costs(costs: pd.DataFrame | None) -> list[dict[str, Any]]:
    rows = []
    for name, row in () if costs is None else costs.iterrows():
        before, after = _finite(row["before"]), _finite(row["after"])
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


def _shown_units(table: pd.DataFrame) -> pd.DataFrame:
    """Return all units, or of very many the ones whose case was closest, in the order of the table."""
    if len(table) <= MOST_ROWS:
        return table
    distance = np.abs(table["score"].to_numpy(dtype=float, na_value=np.nan))
    closest = np.argsort(distance, kind="stable")[:SHOWN_ROWS]
    return table.iloc[np.sort(closest)]


def _settings(
    fit: Fit | None, plan: Reduction, settings: Mapping[str, Any] | None
) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Run", settings or {}),
        ("Fit", {} if fit is None else fit.settings),
        ("Reduction", {"criterion": plan.criterion, "kl_weight": plan.kl_weight}),
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


def _rows(table: pd.DataFrame, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    chosen = [table[column].tolist() for column in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*chosen, strict=True)]


def _finite(value: object) -> float | None:
    """Return a number, or None for anything that is not a finite one (None, NaN, pandas.NA, a text)."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _number(value: object, pattern: str = ".4g") -> str:
    number = _finite(value)
    return "–" if number is None else format(number, pattern)


def _percent(value: object, decimals: int = 1) -> str:
    """Print a fraction in per cent, with more decimals where rounding would claim all or nothing."""
    number = _finite(value)
    if number is None:
        return "–"
    text = f"{100 * number:.{decimals}f}"
    while float(text) in (0.0, 100.0) and 100 * number not in (0.0, 100.0) and decimals < 6:
        decimals += 1
        text = f"{100 * number:.{decimals}f}"
    return f"{text} %"
