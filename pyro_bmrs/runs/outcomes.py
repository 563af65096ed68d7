"""Results of runs: one in a terminal, several side by side in a terminal or on a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyro_bmrs.arguments import check
from pyro_bmrs.figures import plot_criteria, plot_runs
from pyro_bmrs.files import check_file, write_table
from pyro_bmrs.numerals import number, percent, percent_with_error, with_error
from pyro_bmrs.reports.page import svg, told, write_page
from pyro_bmrs.reports.words import (
    khat_text,
    posterior_warnings,
    removal_warnings,
    verdict,
    warnings_of,
)
from pyro_bmrs.runs.folder import SIZES, RunFolder
from pyro_bmrs.tables import FRONTIER_COLUMNS, MOST_CRITERIA

type Columns = Sequence[tuple[str, str, str]]
type Rows = Sequence[Mapping[Any, Any]]

# The columns of tables: key, label, and kind: "text", "%" for a share, "%±" for an accuracy, "khat", or the format of a
# number.
OUTCOMES: Columns = (
    ("run", "run", "text"), ("recipe", "recipe", "text"), ("data", "data", "text"), ("criterion", "criterion", "text"),
    ("seed", "seed", ".0f"), ("kl_weight", "KL weight", "g"),
    ("parameters_before", "parameters before", ",.0f"), ("parameters", "after", ",.0f"), ("removed", "removed", "%"),
    ("accuracy", "test accuracy", "%±"), ("rmse", "test RMSE", "r±"), ("r2", "R²", ".4f"),
    ("negative_log_likelihood", "negative log-likelihood (nats)", ".4f"),
    ("brier", "Brier score", ".4f"), ("expected_calibration_error", "calibration error", ".4f"),
    ("khat", "worst k̂ of a part", "khat"),
)  # fmt: skip
NETWORKS: Columns = (
    ("network", "network", "text"), ("parameters", "parameters", ",.0f"), ("accuracy", "test accuracy", "%±"),
    ("rmse", "test RMSE", "r±"), ("r2", "R²", ".4f"), ("negative_log_likelihood", "test NLL (nats)", ".4f"),
    ("coverage", "in the 90 % interval", "%"),
)  # fmt: skip
LAYERS: Columns = (
    ("layer", "layer", "text"), ("before", "before", ",.0f"), ("after", "after", ",.0f"), ("removed", "removed", "%"),
)  # fmt: skip
KHAT: Columns = (
    ("part", "part of the posterior", "text"), ("khat", "Pareto k̂", "khat"), ("threshold", "reliable up to", ".2f"),
)  # fmt: skip


def shown(row: Mapping[Any, Any], key: str, kind: str) -> str:
    """The text of a table's cell.

    >>> row = {"share": 0.25, "count": 1370, "accuracy": 0.982, "accuracy_error": 0.003}
    >>> shown(row, "share", "%"), shown(row, "count", ",.0f"), shown(row, "accuracy", "%±")
    ('25.00 %', '1,370', '98.20 ± 0.30 %')
    """
    value = row.get(key, float("nan"))
    if kind == "text":
        return str(value)
    if kind == "%±":
        return percent_with_error(value, row.get("accuracy_error"))
    if kind == "r±":
        return with_error(value, row.get("rmse_error"))
    if kind == "%":
        return percent(value, 2)
    return khat_text(value) if kind == "khat" else number(value, kind)


def table_of(columns: Columns, rows: Rows) -> Table:
    """A table for a terminal, without columns that are empty. Names are shown as they are, without markup."""
    columns, table = told(columns, rows), Table()
    for index, (_, label, _) in enumerate(columns):
        table.add_column(Text(label), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(row, key, kind)) for key, _, kind in columns))
    return table


def compare_runs(folders: Sequence[Path | str]) -> pd.DataFrame:
    """Results of several runs, a row each.

    Args:
        folders: of runs that have been reduced.

    Returns:
        Columns run (the shortest end of the folder's path that tells it from the others), recipe, data, seed,
        kl_weight (NaN: trained weights), criterion, parameters_before, parameters, removed (0 to 1); of the final
        network on the test examples accuracy (0 to 1) with its standard error accuracy_error, of a regression instead
        rmse, rmse_error and r2, and negative_log_likelihood (nats per example); and, if the run has a diagnosis, of
        the final network brier and expected_calibration_error, and khat, the worst of any part of the posterior (NaN:
        no diagnosis).

    Raises:
        ValueError: for fewer than two folders, one that is named twice, or one that holds no reduced run.
    """
    paths = [Path(folder) for folder in folders]
    check(len(paths) > 1, "runs", "at least two, to be compared", len(paths))
    twice = [
        str(path)
        for index, path in enumerate(paths)
        if path.resolve() in [p.resolve() for p in paths[:index]]
    ]
    if twice:
        raise ValueError(f"runs must be different folders: {twice[0]} is given twice")
    return pd.DataFrame(
        [_row(name, RunFolder(path)) for name, path in zip(_names(paths), paths, strict=True)]
    )


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def _row(name: str, run: RunFolder) -> dict[str, Any]:
    stored = run.needed_settings()
    settings, evaluation, diagnosis = stored["settings"], run.evaluation(), run.diagnosis()
    rule = run.plan().rule
    final = evaluation.iloc[-1]
    row = dict(
        run=name, recipe=stored["recipe"], data=settings.data_name, seed=settings.seed,
        kl_weight=rule.kl_weight if settings.weights is None else float("nan"), criterion=rule.criterion,
        parameters_before=int(evaluation.parameters.iloc[0]), parameters=int(final.parameters),
        removed=run.outcome()["removed"], accuracy=float(final.accuracy),
        accuracy_error=float(final.get("accuracy_error", float("nan"))),
        rmse=float(final.get("rmse", float("nan"))), rmse_error=float(final.get("rmse_error", float("nan"))),
        r2=float(final.get("r2", float("nan"))), negative_log_likelihood=float(final.negative_log_likelihood),
        brier=float("nan"), expected_calibration_error=float("nan"), khat=float("nan"),
    )  # fmt: skip
    if diagnosis is not None and diagnosis.quality is not None:
        last = diagnosis.quality.iloc[-1]
        row |= {name: float(last[name]) for name in ("brier", "expected_calibration_error")}
    if diagnosis is not None and diagnosis.khat is not None:
        parts = diagnosis.khat.iloc[1:] if len(diagnosis.khat) > 1 else diagnosis.khat
        row["khat"] = float(parts.khat.max())
    return row


def show_runs(folders: Sequence[Path | str], console: Console | None = None) -> None:
    """Print the results of runs that have been reduced.

    Of one run: verdict, networks, widths, k̂ and warnings. Of several, side by side: results, the settings that
    differ, and the widths.

    Args:
        folders: of the runs.
        console: where to print; default the terminal.

    Raises:
        ValueError: if a folder holds no reduced run, or is named twice.
    """
    console = console or Console()
    if len(folders) == 1:
        _show_run(RunFolder(folders[0]), console)
        return
    table, runs = compare_runs(folders), [RunFolder(folder) for folder in folders]
    # A row for each column of the page, because a terminal is narrow.
    rows = [
        {
            "of": label,
            **{f"run {index}": shown(row, key, kind) for index, row in enumerate(table.to_dict("records"))},
        }
        for key, label, kind in OUTCOMES[1:]
    ]
    columns = _run_columns(table)
    console.print(Text(_verdict(table), style="bold"))
    console.print(table_of([("of", "run", "text"), *columns], rows))
    if differing := _differing(columns, runs):
        console.print(table_of([("setting", "setting that differs", "text"), *columns], differing))
    console.print(table_of([("layer", "layer", "text"), *columns], _widths(columns, runs)))


def _show_run(run: RunFolder, console: Console) -> None:
    stored = run.needed_settings()
    evaluation, plan, diagnosis = run.evaluation(), run.plan(), run.diagnosis()
    settings, widths = stored["settings"], plan.widths()
    console.print(Text(verdict(None, plan, None, evaluation.assign(split="test"), run.costs()), style="bold"))
    made = f"{stored['recipe']} on {settings.data_name}, seed {settings.seed}, {settings.posterior_text}"
    console.print(Text(f"{made}, {plan.rule}"))
    console.print(table_of(NETWORKS, evaluation.to_dict("records")))
    layers = widths.assign(removed=1 - widths.after / widths.before)
    console.print(table_of(LAYERS, layers.to_dict("records")))
    khat = None if diagnosis is None else diagnosis.khat
    if khat is not None:
        console.print(table_of(KHAT, khat.to_dict("records")))
    for warning in (
        *removal_warnings(evaluation),
        *warnings_of(plan),
        *posterior_warnings(khat),
    ):
        console.print(Text(f"! {warning}", style="yellow"))
    report = run.folder / "report.html"
    if report.exists():
        console.print(Text(f"report: {report}"))


def report_runs(folders: Sequence[Path | str], out: Path | str = "comparison.html") -> Path:
    """Write a self-contained HTML page that compares runs, and beside it the same as Markdown and its table as CSV.

    Args:
        folders: of runs that have been reduced.
        out: the HTML file; the others have its name with ``.md`` and ``.csv``.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: as `compare_runs`, or if out does not end in .html, or can't be written.
    """
    out = Path(out)
    if out.suffix != ".html":
        raise ValueError(f"out must end in .html: got {os.fspath(out)}")
    check_file("out", out)
    table, runs = compare_runs(folders), [RunFolder(folder) for folder in folders]
    columns, rows = _run_columns(table), table.to_dict("records")
    curves = [
        _curve(run).assign(criterion=name)
        for name, run in zip(table.run, runs, strict=True)
        if run.has(SIZES)
    ]
    # Regressions have no accuracy to draw.
    curves = [curve for curve in curves if curve.accuracy.notna().any()]
    drawn = pd.concat(curves[:MOST_CRITERIA], ignore_index=True) if curves else None
    content = dict(
        title="Comparison of runs",
        verdict=_verdict(table),
        outcomes=OUTCOMES,
        rows=rows,
        texts=[[shown(row, key, kind) for key, _, kind in OUTCOMES] for row in rows],
        columns=columns,
        differing=_differing(columns, runs),
        widths=_widths(columns, runs),
        scatter=svg("runs", lambda: plot_runs(table)) if table.accuracy.notna().any() else None,
        curves=None if drawn is None else svg("curves", lambda: plot_criteria(drawn)),
        curves_left_out=max(0, len(curves) - MOST_CRITERIA),
    )
    write_page(out, "comparison", content)
    write_table(out.with_suffix(".csv"), table)
    return out


def _curve(run: RunFolder) -> pd.DataFrame:
    """Accuracy against the share of parameters removed, of networks of all sizes."""
    sizes = run.read_table(SIZES, *FRONTIER_COLUMNS)
    removed = 1 - sizes.parameters / run.evaluation().parameters.iloc[0]
    return sizes.assign(parameters_removed=removed)[["parameters_removed", "accuracy", "loss", "is_plan"]]


def _verdict(table: pd.DataFrame) -> str:
    """Of each data set the smallest run that is as good as the best one, within two standard errors."""
    found = [f"{len(table)} runs"]
    for data, every in table.groupby("data", sort=False):
        classes = bool(every.accuracy.notna().any())
        measure, sign = ("accuracy", 1) if classes else ("rmse", -1)
        runs = every[every[measure].notna()]
        if runs.empty:
            continue
        value, errors = sign * runs[measure], runs[f"{measure}_error"].fillna(0.0)
        best = int(value.argmax())
        level = runs[value >= value.iloc[best] - 2 * np.hypot(errors, errors.iloc[best])]
        chosen = level.iloc[int(level.parameters.argmin())].to_dict()
        has = shown(chosen, measure, "%±") if classes else f"an RMSE of {shown(chosen, measure, 'r±')}"
        found.append(
            f"on {data} the smallest that is as {'accurate' if classes else 'good'} as the best, {chosen['run']}, has "
            f"{has} with {100 * chosen['removed']:.1f} % of its parameters removed"
        )
    return "; ".join(found)


def _run_columns(table: pd.DataFrame) -> Columns:
    """A column for each run, by number: a run may have the name of another column."""
    return [(f"run {index}", name, "text") for index, name in enumerate(table.run)]


def _differing(columns: Columns, runs: Sequence[RunFolder]) -> Rows:
    """A row per setting that is not the same in all runs, with a column per run."""
    stored = [run.needed_settings() for run in runs]
    settings = [{"recipe": found["recipe"], **found["settings"].model_dump()} for found in stored]
    return [
        {
            "setting": key,
            **{name: str(chosen[key]) for (name, *_), chosen in zip(columns, settings, strict=True)},
        }
        for key in settings[0]
        if len({str(chosen[key]) for chosen in settings}) > 1
    ]


def _widths(columns: Columns, runs: Sequence[RunFolder]) -> Rows:
    """A row per layer of any run, with a column per run."""
    found: dict[str, dict[str, str]] = {}
    for (name, *_), run in zip(columns, runs, strict=True):
        for row in run.plan().widths().itertuples():
            found.setdefault(str(row.layer), {})[name] = f"{row.before} → {row.after}"
    return [
        {"layer": layer, **{name: widths.get(name, "–") for name, *_ in columns}}
        for layer, widths in found.items()
    ]
