"""Several runs side by side: what differs in their settings, what came out, and how wide they ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_bmrs.reports.page import svg, write_page
from pyro_bmrs.figures.posterior_plots import plot_criteria, plot_runs
from pyro_bmrs.files import check_file, write_table
from pyro_bmrs.runs.folder import RunFolder

# More lines than these can't be told apart.
MOST_CURVES = 8


def compare_runs(folders: Sequence[Path | str]) -> pd.DataFrame:
    """What came out of several runs, a row each.

    Args:
        folders: of runs that have been reduced.

    Returns:
        Columns run (the shortest end of the folder's path that tells it from the others), recipe, data, seed,
        kl_weight, criterion, parameters_before, parameters, removed (0 to 1), accuracy (0 to 1) and
        negative_log_likelihood (nats per example) of the final network on the test examples; and, where the run has a
        diagnosis, of the final network brier and expected_calibration_error, and khat, the worst of any part of the
        posterior (NaN: no diagnosis).

    Raises:
        ValueError: for fewer than two folders, one that is named twice, or one that holds no reduced run.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"runs must be at least two, to be compared: got {len(paths)}")
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
    final = evaluation.iloc[-1]
    row = dict(
        run=name, recipe=stored["recipe"], data=settings.data, seed=settings.seed, kl_weight=settings.kl_weight,
        criterion=settings.criterion, parameters_before=int(evaluation.parameters.iloc[0]),
        parameters=int(final.parameters), removed=run.outcome()["removed"], accuracy=float(final.accuracy),
        negative_log_likelihood=float(final.negative_log_likelihood),
        brier=float("nan"), expected_calibration_error=float("nan"), khat=float("nan"),
    )  # fmt: skip
    if diagnosis is not None and diagnosis.quality is not None:
        last = diagnosis.quality.iloc[-1]
        row |= {name: float(last[name]) for name in ("brier", "expected_calibration_error")}
    if diagnosis is not None and diagnosis.khat is not None:
        parts = diagnosis.khat.iloc[1:] if len(diagnosis.khat) > 1 else diagnosis.khat
        row["khat"] = float(parts.khat.max())
    return row


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
    table = compare_runs(folders)
    runs = [RunFolder(folder) for folder in folders]
    # by number: a run may be called like another column
    columns = [(f"run {index}", name, "text") for index, name in enumerate(table.run)]
    curves = [
        run.read_table("curve.csv").assign(criterion=name)
        for name, run in zip(table.run, runs, strict=True)
        if run.has("curve.csv")
    ]
    # regressions have losses, and no accuracy to draw
    curves = [curve for curve in curves if curve.accuracy.notna().any()]
    shown = pd.concat(curves[:MOST_CURVES], ignore_index=True) if curves else None
    best = table.iloc[int(table.accuracy.argmax())] if table.accuracy.notna().any() else None
    content = dict(
        title="Comparison of runs",
        verdict=f"{len(table)} runs"
        + ("" if best is None else f"; the most accurate, {best.run}, has {100 * best.accuracy:.2f} % with "
           f"{100 * best.removed:.1f} % of its parameters removed"),
        rows=table.to_dict("records"),
        columns=columns,
        differing=_differing([key for key, _, _ in columns], runs),
        widths=_widths([key for key, _, _ in columns], runs),
        scatter=None if best is None else svg("runs", lambda: plot_runs(table)),
        curves=None if shown is None else svg("curves", lambda: plot_criteria(shown)),
        curves_left_out=max(0, len(curves) - MOST_CURVES),
    )  # fmt: skip
    write_page(out, "comparison", content)
    write_table(out.with_suffix(".csv"), table)
    return out


def _differing(columns: Sequence[str], runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row per setting that is not the same in all runs, with a column per run."""
    stored = [run.needed_settings() for run in runs]
    settings = [{"recipe": found["recipe"], **dict(found["settings"])} for found in stored]
    return [
        {"setting": key, **{name: str(chosen[key]) for name, chosen in zip(columns, settings, strict=True)}}
        for key in settings[0]
        if len({str(chosen[key]) for chosen in settings}) > 1
    ]


def _widths(columns: Sequence[str], runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """A row per layer of any run, with a column per run."""
    found: dict[str, dict[str, str]] = {}
    for name, run in zip(columns, runs, strict=True):
        for row in run.plan().widths().itertuples():
            found.setdefault(str(row.layer), {})[name] = f"{row.before} → {row.after}"
    return [
        {"layer": layer, **{name: widths.get(name, "–") for name in columns}}
        for layer, widths in found.items()
    ]
