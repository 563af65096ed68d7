"""The command line: `pyro-bmrs run RECIPE --data NAME --out DIR` and its parts.

Nothing heavy is imported before a command runs: `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pyro_bmrs.runs import Run

app = typer.Typer(
    name="pyro-bmrs",
    help="Make neural networks smaller by Bayesian evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option(help="Folder for everything that comes out.")]
Data = Annotated[
    str, typer.Option(help="digits, mnist, fashion-mnist, cifar10, a .npz file or an image folder.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data sets are; default $PYRO_BMRS_DATA, ~/.cache/pyro_bmrs.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of the fit; default the recipe's.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per step.")]
Seed = Annotated[int, typer.Option(help="Seeds weights, split, order and noise.")]
KLWeight = Annotated[
    float | None, typer.Option("--kl-weight", help="Factor on the KL; 1 is the ELBO. More removes more.")
]
LearningRate = Annotated[float | None, typer.Option(help="Of the weights.")]
PosteriorRate = Annotated[float | None, typer.Option(help="Of the posterior's parameters.")]
Draws = Annotated[int | None, typer.Option(help="Values of θ per batch; default one per example.")]
Removal = Annotated[str | None, typer.Option(help="end, or epoch: remove after each epoch too.")]
Limit = Annotated[int | None, typer.Option(help="Use only so many training examples.")]
CriterionName = Annotated[
    str | None,
    typer.Option(
        "--criterion", help="BMRS_N, BMRS_U:bits=4, SNR, ExpectedScale, WeightNorm, Random:fraction=0.5."
    ),
]
LogOdds = Annotated[
    float | None,
    typer.Option(help="Prior log-odds of removal: 0 is the paper's equation, 0.919 its released code."),
]
MinKept = Annotated[int | None, typer.Option(help="Structures that every layer keeps.")]
FineTune = Annotated[int | None, typer.Option(help="Epochs of fine-tuning the small network.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew where the folder holds a run.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
RecipeFile = Annotated[Path, typer.Argument(help="A Python file like those in models/.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder.")]

_STAGE_FILES = (
    "settings.json", "recipe.py", "posterior.safetensors", "history.csv", "removals.csv", "structures.csv",
    "evaluation.csv", "curve.csv", "plan.json", "plan.safetensors", "small.safetensors", "small.pt2",
    "report.html",
)  # fmt: skip


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"


def _new_run(recipe: Path, out: Path, options: dict[str, Any]) -> Run:
    from pyro_bmrs.runs import Recipe, Run, Settings

    overwrite, device = options.pop("overwrite"), options.pop("device")
    data_root, quiet, data = options.pop("data_root"), options.pop("quiet"), options.pop("data")
    read = Recipe.read(recipe)
    settings = Settings.of(read, data, options)
    if overwrite:
        for name in _STAGE_FILES:
            (out / name).unlink(missing_ok=True)
    return Run(out, read, settings, data_root=data_root, device=_device(device), progress=not quiet)


def _old_run(folder: Path, data_root: Path | None, device: str, quiet: bool, **changes: Any) -> Run:
    from dataclasses import replace

    from pyro_bmrs.runs import Run

    run = Run(folder, data_root=data_root, device=_device(device), progress=not quiet)
    run.load_posterior()
    run.settings = replace(run.settings, **{k: v for k, v in changes.items() if v is not None})
    return run


def _announce(run: Run) -> None:
    settings = run.settings
    weight = f"KL weight {settings.kl_weight:g}" + ("" if settings.kl_weight == 1 else " (1 is the ELBO)")
    typer.echo(f"{run.recipe.path.name} on {run.dataset}; seed {settings.seed}, {weight}", err=True)


def _print_outcome(run: Run) -> None:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from pyro_bmrs.reduction.reduce import Reduction

    evaluation = pd.read_csv(run.folder / "evaluation.csv")
    table = Table(title=None)
    for name in ("network", "parameters", "test accuracy", "test NLL (nats)"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in evaluation.itertuples():
        table.add_row(
            str(row.network), f"{row.parameters:,}", f"{100 * row.accuracy:.2f} %",
            f"{row.negative_log_likelihood:.4f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(Reduction.load(run.folder / "plan.json").summary(), markup=False, highlight=False)
    outcome = run.outcome()
    console.print(
        f"{100 * outcome['removed']:.1f} % of the parameters physically removed, "
        f"test accuracy {100 * outcome['accuracy']:.2f} %",
        highlight=False,
    )


def _check_required(run: Run, removed: float | None, accuracy: float | None) -> None:
    outcome = run.outcome()
    for name, least in (("removed", removed), ("accuracy", accuracy)):
        if least is not None and outcome[name] < least:
            typer.echo(f"pyro-bmrs: {name} is {outcome[name]:.4f}, required at least {least:g}", err=True)
            raise typer.Exit(1)


@app.command()
def run(
    recipe: RecipeFile,
    data: Data = "digits",
    out: Out = Path("runs/latest"),
    data_root: DataRoot = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    criterion: CriterionName = None,
    kl_weight: KLWeight = None,
    prior_log_odds: LogOdds = None,
    fine_tune: FineTune = None,
    min_kept: MinKept = None,
    learning_rate: LearningRate = None,
    posterior_learning_rate: PosteriorRate = None,
    draws_per_batch: Draws = None,
    removal: Removal = None,
    limit: Limit = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    require_removed: Annotated[
        float | None, typer.Option(help="Exit with 1 if less of the parameters is removed (0 to 1).")
    ] = None,
    require_accuracy: Annotated[
        float | None, typer.Option(help="Exit with 1 if the test accuracy is lower (0 to 1).")
    ] = None,
) -> None:
    """Fit, reduce, remove, fine-tune and report; called again it goes on from the last finished stage."""
    options = dict(
        data=data, data_root=data_root, epochs=epochs, batch_size=batch_size, seed=seed, criterion=criterion,
        kl_weight=kl_weight, prior_log_odds=prior_log_odds, fine_tune=fine_tune, min_kept=min_kept,
        learning_rate=learning_rate, posterior_learning_rate=posterior_learning_rate,
        draws_per_batch=draws_per_batch, removal=removal, limit=limit, device=device, overwrite=overwrite,
        quiet=quiet,
    )  # fmt: skip
    current = _new_run(recipe, out, options)
    _announce(current)
    if current.complete():
        typer.echo(f"{out} already holds this run, complete", err=True)
    else:
        current.fit()
        current.reduce()
        current.report()
    _print_outcome(current)
    typer.echo(f"report: {out / 'report.html'}")
    _check_required(current, require_removed, require_accuracy)


@app.command()
def fit(
    recipe: RecipeFile,
    data: Data = "digits",
    out: Out = Path("runs/latest"),
    data_root: DataRoot = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    criterion: CriterionName = None,
    kl_weight: KLWeight = None,
    prior_log_odds: LogOdds = None,
    learning_rate: LearningRate = None,
    posterior_learning_rate: PosteriorRate = None,
    draws_per_batch: Draws = None,
    removal: Removal = None,
    limit: Limit = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit the posterior only."""
    options = dict(
        data=data, data_root=data_root, epochs=epochs, batch_size=batch_size, seed=seed, criterion=criterion,
        kl_weight=kl_weight, prior_log_odds=prior_log_odds, learning_rate=learning_rate,
        posterior_learning_rate=posterior_learning_rate, draws_per_batch=draws_per_batch, removal=removal,
        limit=limit, device=device, overwrite=overwrite, quiet=quiet,
    )  # fmt: skip
    current = _new_run(recipe, out, options)
    _announce(current)
    result = current.fit()
    typer.echo(str(result) if result is not None else f"{out} already holds this fit")


@app.command()
def reduce(
    folder: RunFolder,
    criterion: CriterionName = None,
    prior_log_odds: LogOdds = None,
    min_kept: MinKept = None,
    fine_tune: FineTune = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Reduce a fitted run again, by another criterion if you like, and write the small network."""
    current = _old_run(
        folder, data_root, device, quiet,
        criterion=criterion, prior_log_odds=prior_log_odds, min_kept=min_kept, fine_tune=fine_tune,
    )  # fmt: skip
    from pyro_bmrs.reduction.criteria import parse_criterion

    parse_criterion(current.settings.criterion, current.settings.prior_log_odds)
    current.reduce()
    _print_outcome(current)


@app.command()
def report(
    folder: RunFolder, data_root: DataRoot = None, device: Device = "auto", quiet: Quiet = False
) -> None:
    """Write the report of a reduced run anew."""
    typer.echo(f"report: {_old_run(folder, data_root, device, quiet).report()}")


@app.command()
def predict(
    folder: RunFolder,
    inputs: Annotated[
        Path | None, typer.Option(help="A .npy, or .npz with x, of raw inputs; default the test examples.")
    ] = None,
    out: Annotated[Path, typer.Option(help="CSV to write: label, probability.")] = Path("predictions.csv"),
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Predict with the small network of a run."""
    from pyro_bmrs.data import read_inputs
    from pyro_bmrs.networks.export import write_atomically
    from pyro_bmrs.runs import Run

    current = Run(folder, data_root=data_root, device=_device(device))
    x = current.dataset.test[:][0] if inputs is None else current.dataset.prepare(read_inputs(inputs))
    table = current.predict(x)
    write_atomically(out, lambda beside: table.to_csv(beside, index=False))
    typer.echo(f"{len(table)} predictions in {out}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; any mistake of the user's is one line on stderr and exit status 2."""
    sys.exit(_guarded(lambda: app(arguments, standalone_mode=False)))


def _guarded(command: Callable[[], Any]) -> int:
    from typer.exceptions import TyperException

    try:
        status = command()
    except TyperException as error:
        message = getattr(error, "format_message", lambda: str(error))()
        return _complain(message)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("pyro-bmrs: interrupted", err=True)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("PYRO_BMRS_DEBUG"):
            raise
        if type(error).__name__ == "Interrupted":
            typer.echo(f"pyro-bmrs: {error}", err=True)
            return 130
        return _complain(str(error) or type(error).__name__)
    return status if isinstance(status, int) else 0


def _complain(message: str) -> int:
    typer.echo(f"pyro-bmrs: error: {' '.join(message.split())}", err=True)
    return 2


if __name__ == "__main__":
    main()
