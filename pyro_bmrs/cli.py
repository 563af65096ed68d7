"""The command line: `pyro-bmrs run RECIPE --data NAME --out DIR` and its parts.

Nothing heavy is imported before a command runs: `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from pyro_bmrs import __version__
from pyro_bmrs.numerals import with_error
from pyro_bmrs.options import (
    DataRoot,
    Device,
    FoldPreprocessing,
    Foreign,
    Inputs,
    LoggerName,
    MovedData,
    Out,
    Overwrite,
    PosteriorDraws,
    Predictions,
    Quiet,
    RecipeFile,
    RunFolder,
    Tolerance,
    given_settings,
    number,
    whole,
    with_settings,
)
from pyro_bmrs.runs.settings import OF_REDUCTION, RunSettings

if TYPE_CHECKING:
    from pyro_bmrs.runs.run import Run
    from pyro_bmrs.runs.study import Study

app = typer.Typer(
    name="pyro-bmrs",
    help="Make neural networks smaller by Bayesian evidence.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"pyro-bmrs {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make neural networks smaller by Bayesian evidence."""


def _new_run(context: typer.Context) -> Run:
    from pyro_bmrs.runs.recipe import Recipe
    from pyro_bmrs.runs.run import Run
    from pyro_bmrs.runs.shipped import find_recipe

    options, given = context.params, given_settings(context)
    recipe = Recipe.read(find_recipe(options["recipe"]))
    data = given.pop("data", RunSettings.model_fields["data"].default)
    current = Run(
        options["out"], recipe, RunSettings.of(recipe, data, given), data_root=options["data_root"],
        device=options["device"], logger=options["logger"], progress=not options["quiet"],
        overwrite=options["overwrite"],
    )  # fmt: skip
    settings = current.settings
    note = "" if settings.weights or settings.kl_weight in (1, "auto") else " (1 is the ELBO)"
    told = f"{recipe.name} on {current.dataset}; seed {settings.seed}, {settings.posterior_text}{note}"
    print(told, flush=True)
    return current


def _old_run(context: typer.Context, folder: Path) -> Run:
    from pyro_bmrs.runs.run import Run

    options = context.params
    return Run(
        folder, changes=given_settings(context), data_root=options["data_root"], device=options["device"],
        progress=not options["quiet"],
    )  # fmt: skip


@contextmanager
def _telling_what_goes(run: Run) -> Iterator[None]:
    """Tells which files of an earlier reduction or report are gone, because they would not belong to the new fit."""
    before = run.after_fit()
    yield
    gone = [name for name in before if not run.has(name)]
    if gone:
        stage = "report" if run.has("plan.json") else "reduce"
        print(f"removed, as made for another reduction: {', '.join(gone)}")
        print(f"to make them anew: pyro-bmrs {stage} {run.folder}")


def _print_outcome(run: Run) -> None:
    from rich.console import Console

    from pyro_bmrs.runs.outcomes import NETWORKS, table_of

    console = Console()
    console.print(table_of(NETWORKS, run.evaluation().to_dict("records")))
    console.print(run.plan().summary(), markup=False, highlight=False, soft_wrap=True)
    outcome, final = run.outcome(), run.evaluation().iloc[-1]
    found = f"accuracy {100 * outcome['accuracy']:.2f} %"
    if "rmse" in final:
        found = f"RMSE {with_error(final.rmse, final.rmse_error)}"
    removed = f"{100 * outcome['removed']:.1f} % of the parameters physically removed"
    console.print(f"{removed}, test {found}", highlight=False)


def _print_cells(study: Study) -> None:
    from rich.console import Console

    from pyro_bmrs.runs.outcomes import table_of

    fits = list(dict.fromkeys(cell.fit for cell in study.cells))
    columns = [
        (name, name.replace("_", " "), "text") for name in ("folder", "kl_weight", "criterion", "seed", "fit")
    ]
    rows = [
        {**cell.settings.model_dump(), "folder": cell.name, "fit": fits.index(cell.fit) + 1}
        for cell in study.cells
    ]
    console = Console()
    console.print(table_of(columns, rows))
    told = f"{len(study.cells)} cells, {len(fits)} fits, in {study.out}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)


# `_new_run` and `_old_run` take options from the context by name. So an option appears once, in a signature.
# Options that are settings are made from their fields.


@app.command()
def new(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write, such as mine.py.")],
) -> None:
    """Write a commented recipe to start from."""
    from pyro_bmrs.runs.shipped import write_starter

    write_starter(recipe)
    print(f"{recipe} is there; try: pyro-bmrs run {recipe} --data digits --out runs/{recipe.stem}")


@app.command()
@with_settings(*RunSettings.model_fields)
def run(
    context: typer.Context,
    recipe: RecipeFile,
    out: Out = Path("runs/latest"),
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    device: Device = "auto",
    logger: LoggerName = None,
    draws: PosteriorDraws = None,
    foreign: Foreign = None,
    quiet: Quiet = False,
    require_removed: Annotated[
        float | None,
        typer.Option(parser=number, help="Exit with 1 if a smaller share of the parameters is removed."),
    ] = None,
    require_accuracy: Annotated[
        float | None,
        typer.Option(parser=number, help="Exit with 1 if the test accuracy, from 0 to 1, is lower."),
    ] = None,
    **settings: Any,
) -> int:
    """Fit, reduce, remove, fine-tune and report. Called again, it goes on from the last finished stage."""
    required = {"removed": require_removed, "accuracy": require_accuracy}
    for name, least in required.items():
        if least is not None and not 0 <= least <= 1:
            raise ValueError(f"--require-{name} must be a share from 0 to 1: got {least:g}")
    current = _new_run(context)
    if not current.finish(draws=draws, foreign=foreign):
        print(f"{out} already holds this run, complete")
    _print_outcome(current)
    print(f"report: {out / 'report.html'}")
    outcome = current.outcome()
    # An unknown accuracy, NaN, is not enough.
    missed = [
        f"{name} is {outcome[name]:.4f}, required at least {least:g}"
        for name, least in required.items()
        if least is not None and not outcome[name] >= least
    ]
    if missed:
        print(f"pyro-bmrs: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


@app.command()
@with_settings(*RunSettings.model_fields)
def fit(
    context: typer.Context,
    recipe: RecipeFile,
    out: Out = Path("runs/latest"),
    overwrite: Overwrite = False,
    data_root: DataRoot = None,
    device: Device = "auto",
    logger: LoggerName = None,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Fit the posterior only."""
    current = _new_run(context)
    with _telling_what_goes(current):
        result = current.fit()
    print(f"{out} already holds this fit" if result is None else result)


@app.command()
@with_settings(*OF_REDUCTION, whose="run")
def reduce(
    context: typer.Context,
    folder: RunFolder,
    data: MovedData = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Reduce a fitted run again, for example by another criterion, and write the small network."""
    current = _old_run(context, folder)
    current.load_posterior()
    with _telling_what_goes(current):
        current.reduce()
        _print_outcome(current)


@app.command()
def report(
    context: typer.Context,
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="A run's folder; of several, a comparison.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The page of a comparison, with .md and .csv beside it; default comparison.html."),
    ] = None,
    draws: PosteriorDraws = None,
    foreign: Foreign = None,
    data: MovedData = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Write the report of a reduced run again, or compare several runs."""
    if len(folders) > 1:
        for name, value in (("draws", draws), ("foreign", foreign), ("data", data)):
            if value is not None:
                raise ValueError(f"--{name} is for the report of one run: got it with {len(folders)}")
        from pyro_bmrs.runs.outcomes import report_runs

        print(f"report: {report_runs(folders, out or Path('comparison.html'))}")
        return
    if out is not None:
        raise ValueError(f"--out is for comparisons, the report of one run is in its folder: got {out}")
    current = _old_run(context, folders[0])
    current.load_posterior()
    print(f"report: {current.report(draws=draws, foreign=foreign)}")


@app.command()
def show(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="A run's folder; several are shown side by side.")
    ],
) -> None:
    """Print the results of runs: sizes, accuracy, widths; of one run also k̂ and warnings."""
    from pyro_bmrs.runs.outcomes import show_runs

    show_runs(folders)


@app.command()
def predict(
    context: typer.Context,
    folder: RunFolder,
    inputs: Inputs = None,
    out: Predictions = Path("predictions.csv"),
    data: MovedData = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Predict with the small network of a run."""
    from pyro_bmrs.files import check_file, write_table
    from pyro_bmrs.runs.served import Served

    check_file("out", out)
    if inputs is None:
        current = _old_run(context, folder)
        table = current.predict(current.dataset.test[:][0])
    else:
        served = Served(folder)
        x, files = served.preparation.read(inputs)
        table = served.predict(x)
        if files is not None:
            table.insert(0, "file", files)
    write_table(out, table)
    print(f"{len(table)} predictions in {out}")


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[
        Path, typer.Option(help="File to write: .onnx (needs the extra onnx) or .pt2 (torch.export).")
    ] = Path("small.onnx"),
    fold_preprocessing: FoldPreprocessing = False,
    tolerance: Tolerance = None,
) -> None:
    """Write the small network of a run for other programs, checked to compute the same."""
    from pyro_bmrs.runs.served import Served

    path = Served(folder).export(out, fold_preprocessing=fold_preprocessing, tolerance=tolerance)
    print(f"small network in {path}")


@app.command()
def sweep(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file; docs/sweeps.md has its keys.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for all results; default, here and below: as the file says."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(parser=whole, help="Runs at the same time.")] = None,
    backend: Annotated[str | None, typer.Option(help="processes, or ray (needs the extra ray).")] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    quiet: Quiet = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and stop.")] = False,
) -> int:
    """Do the runs of all combinations in a file, with one table of results. Called again, it goes on."""
    from pyro_bmrs.runs.study import Study

    asked = Study.read(study, out=out, jobs=jobs, backend=backend)
    if dry_run:
        _print_cells(asked)
        return 0
    from pyro_bmrs.runs.sweep import run_study

    table = run_study(asked, data_root=data_root, device=device, progress=not quiet)
    failed = table[table.status == "failed"]
    print(f"{len(table) - len(failed)} of {len(table)} cells done; results: {asked.out / 'results.csv'}")
    for row in failed.itertuples():
        print(f"pyro-bmrs: {row.folder} failed: {row.error}", file=sys.stderr)
    return 1 if len(failed) else 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line. A mistake of the user is one line on stderr and exit status 2."""
    sys.exit(_guarded(arguments))


def _guarded(arguments: list[str] | None) -> int:
    try:
        # app() would answer Ctrl-C itself, without saying what is kept.
        command = typer.main.get_command(app)
        words = sys.argv[1:] if arguments is None else arguments
        with command.make_context("pyro-bmrs", list(words)) as context:
            status = command.invoke(context)
        return status if isinstance(status, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
    except (KeyboardInterrupt, typer.Abort) as error:
        print(f"pyro-bmrs: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        if os.environ.get("PYRO_BMRS_DEBUG"):
            raise
        message = str(error) or type(error).__name__
    print(f"pyro-bmrs: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
