"""The essentials of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyro_bmrs.numerals import number, percent
from pyro_bmrs.reports.words import (
    khat_text,
    posterior_warnings,
    removal_warnings,
    verdict,
    warnings_of,
)
from pyro_bmrs.runs.folder import RunFolder


def show_run(folder: Path | str, console: Console | None = None) -> None:
    """Print what came out of a reduced run: verdict, networks, widths, k̂ and warnings.

    Args:
        folder: of the run.
        console: where to print; default the terminal.

    Raises:
        ValueError: if the folder holds no reduced run.
    """
    run, console = RunFolder(folder), console or Console()
    stored = run.needed_settings()
    evaluation, plan, diagnosis = run.evaluation(), run.plan(), run.diagnosis()
    settings, widths = stored["settings"], plan.widths()
    # what a user named is text, with no markup in it
    console.print(Text(verdict(None, plan, None, evaluation.assign(split="test")), style="bold"))
    console.print(
        Text(
            f"{stored['recipe']} on {settings.data}, seed {settings.seed}, KL weight {settings.kl_weight:g}, "
            f"{plan.rule}"
        )
    )
    console.print(
        _table(
            ["network", "parameters", "test accuracy", "NLL (nats)"],
            [
                [
                    row["network"],
                    f"{row['parameters']:,}",
                    # a network that shrank while it was fitted has no accuracy of its own
                    "" if isnan(row["accuracy"]) else percent(row["accuracy"], 2),
                    "" if isnan(row["accuracy"]) else number(row["negative_log_likelihood"], ".4f"),
                ]
                for row in evaluation.to_dict("records")
            ],
        )
    )
    console.print(
        _table(
            ["layer", "before", "after", "removed"],
            [
                [
                    row["layer"],
                    f"{row['before']:,}",
                    f"{row['after']:,}",
                    percent(1 - row["after"] / row["before"]),
                ]
                for row in widths.to_dict("records")
            ],
        )
    )
    if diagnosis is not None and diagnosis.khat is not None:
        console.print(
            _table(
                ["part of the posterior", "Pareto k̂", "reliable up to"],
                [
                    [row["part"], khat_text(row["khat"]), number(row["threshold"], ".2f")]
                    for row in diagnosis.khat.to_dict("records")
                ],
            )
        )
    warnings = [*removal_warnings(evaluation), *warnings_of(plan, widths), *posterior_warnings(diagnosis)]
    for warning in warnings:
        console.print(Text(f"! {warning}", style="yellow"))
    report = run.folder / "report.html"
    if report.exists():
        console.print(Text(f"report: {report}"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is text, the others are numbers."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
