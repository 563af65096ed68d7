"""The command line: `pyro-bmrs run RECIPE --data NAME --out DIR` and its parts.

Nothing heavy is imported before a command runs: `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pyro_bmrs import __version__

if TYPE_CHECKING:
    from pyro_bmrs.runs import Run

Command = Callable[[Namespace], int]  # gives the exit status

# Options that are settings of a run, by the names `runs.Settings` has for them.
_REDUCE_SETTINGS = ("criterion", "prior_log_odds", "min_kept", "fine_tune")
_FIT_SETTINGS = (
    "epochs", "batch_size", "seed", "kl_weight", "learning_rate", "posterior_learning_rate",
    "draws_per_batch", "removal", "limit",
)  # fmt: skip


class _Parser(ArgumentParser):
    """Says what is wrong with the arguments in one line, without the usage round it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="pyro-bmrs", description="Make neural networks smaller by Bayesian evidence.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    machine = _Parser(add_help=False)
    option = machine.add_argument_group("machine").add_argument
    option(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="where data sets are; default $PYRO_BMRS_DATA, else ~/.cache/pyro_bmrs",
    )
    option("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, …")
    option("--quiet", action="store_true", help="show no progress")

    reduction = _Parser(add_help=False)
    option = reduction.add_argument_group("reduction (default: the recipe's)").add_argument
    option(
        "--criterion",
        metavar="NAME",
        help="BMRS_N, BMRS_U:bits=4, SNR, ExpectedScale, WeightNorm, Random:fraction=0.5",
    )
    option(
        "--prior-log-odds",
        type=float,
        metavar="NATS",
        help="of removal, per structure: 0 is the paper's equation, 0.919 its released code",
    )
    option("--min-kept", type=int, metavar="N", help="structures that every layer keeps")
    option("--fine-tune", type=int, metavar="N", help="epochs of fine-tuning the small network")

    fitting = _Parser(add_help=False)
    fitting.add_argument("recipe", type=Path, metavar="RECIPE", help="a Python file like those in models/")
    option = fitting.add_argument_group("run").add_argument
    option(
        "--data",
        default="digits",
        metavar="NAME",
        help="digits (the default), mnist, fashion-mnist, cifar10, a .npz file or an image folder",
    )
    option(
        "--out",
        type=Path,
        default=Path("runs/latest"),
        metavar="DIR",
        help="folder for everything that comes out; default runs/latest",
    )
    option("--overwrite", action="store_true", help="start anew where the folder holds a run")
    option = fitting.add_argument_group("fit (default: the recipe's)").add_argument
    option("--epochs", type=int, metavar="N")
    option("--batch-size", type=int, metavar="N", help="examples per step")
    option("--seed", type=int, metavar="N", help="of weights, split, order and noise")
    option("--kl-weight", type=float, metavar="W", help="factor on the KL; 1 is the ELBO, more removes more")
    option("--learning-rate", type=float, metavar="RATE", help="of the weights")
    option("--posterior-learning-rate", type=float, metavar="RATE", help="of the posterior's parameters")
    option("--draws-per-batch", type=int, metavar="N", help="values of θ per batch; default one per example")
    option("--removal", metavar="WHEN", help="end, or epoch: remove after each epoch too")
    option("--limit", type=int, metavar="N", help="use only so many training examples")

    folder = _Parser(add_help=False)
    folder.add_argument("folder", type=Path, metavar="DIR", help="a run's folder")

    def command(function: Command, *parents: _Parser) -> _Parser:
        text = function.__doc__
        made = commands.add_parser(
            function.__name__, parents=list(parents), help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(command=function)
        return made

    whole = command(run, fitting, reduction, machine)
    option = whole.add_argument_group("what is required of it").add_argument
    option(
        "--require-removed",
        type=float,
        metavar="SHARE",
        help="exit with 1 if less of the parameters is removed (0 to 1)",
    )
    option(
        "--require-accuracy",
        type=float,
        metavar="SHARE",
        help="exit with 1 if the test accuracy is lower (0 to 1)",
    )
    command(fit, fitting, reduction, machine)
    command(reduce, folder, reduction, machine)
    command(report, folder, machine)
    option = command(predict, folder, machine).add_argument
    option(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="a .npy, or .npz with x, of raw inputs; default the test examples",
    )
    option(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        metavar="FILE",
        help="CSV to write: label, probability; default predictions.csv",
    )
    return parser


def _new_run(given: Namespace) -> Run:
    from pyro_bmrs.runs import Recipe, Run, Settings

    recipe = Recipe.read(given.recipe)
    overrides = {name: getattr(given, name) for name in (*_FIT_SETTINGS, *_REDUCE_SETTINGS)}
    current = Run(
        given.out, recipe, Settings.of(recipe, given.data, overrides), data_root=given.data_root,
        device=given.device, progress=not given.quiet, overwrite=given.overwrite,
    )  # fmt: skip
    weight = current.settings.kl_weight
    print(
        f"{recipe.name} on {current.dataset}; seed {current.settings.seed}, KL weight {weight:g}"
        + ("" if weight == 1 else " (1 is the ELBO)"),
        flush=True,
    )
    return current


def _old_run(given: Namespace, *changes: str) -> Run:
    from pyro_bmrs.runs import Run

    return Run(
        given.folder, changes={name: getattr(given, name) for name in changes}, data_root=given.data_root,
        device=given.device, progress=not given.quiet,
    )  # fmt: skip


def _print_outcome(run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("network", "parameters", "test accuracy", "test NLL (nats)"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in run.evaluation().to_dict("records"):
        table.add_row(
            row["network"],
            f"{row['parameters']:,}",
            f"{100 * row['accuracy']:.2f} %",
            f"{row['negative_log_likelihood']:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(run.plan().summary(), markup=False, highlight=False, soft_wrap=True)
    outcome = run.outcome()
    console.print(
        f"{100 * outcome['removed']:.1f} % of the parameters physically removed, "
        f"test accuracy {100 * outcome['accuracy']:.2f} %",
        highlight=False,
    )


def run(given: Namespace) -> int:
    """Fit, reduce, remove, fine-tune and report; called again it goes on from the last finished stage."""
    required = {"removed": given.require_removed, "accuracy": given.require_accuracy}
    for name, least in required.items():
        if least is not None and not 0 <= least <= 1:
            raise ValueError(f"--require-{name} must be a share from 0 to 1: got {least:g}")
    current = _new_run(given)
    if current.complete() and not given.overwrite:
        print(f"{given.out} already holds this run, complete")
    else:
        current.fit()
        if not current.reduced():
            current.reduce()
        current.report()
    _print_outcome(current)
    print(f"report: {given.out / 'report.html'}")
    outcome = current.outcome()
    # an accuracy that is not known, NaN, is not enough either
    missed = [
        f"{name} is {outcome[name]:.4f}, required at least {least:g}"
        for name, least in required.items()
        if least is not None and not outcome[name] >= least
    ]
    if missed:
        print(f"pyro-bmrs: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def fit(given: Namespace) -> int:
    """Fit the posterior only."""
    result = _new_run(given).fit()
    print(f"{given.out} already holds this fit" if result is None else result)
    return 0


def reduce(given: Namespace) -> int:
    """Reduce a fitted run again, by another criterion if you like, and write the small network."""
    current = _old_run(given, *_REDUCE_SETTINGS)
    current.load_posterior()
    current.reduce()
    _print_outcome(current)
    return 0


def report(given: Namespace) -> int:
    """Write the report of a reduced run anew."""
    current = _old_run(given)
    current.load_posterior()
    print(f"report: {current.report()}")
    return 0


def predict(given: Namespace) -> int:
    """Predict with the small network of a run."""
    from pyro_bmrs.data import read_inputs
    from pyro_bmrs.networks.export import write_atomically

    inputs = None if given.inputs is None else read_inputs(given.inputs)
    current = _old_run(given)
    x = current.dataset.test[:][0] if inputs is None else current.dataset.prepare(inputs)
    table = current.predict(x)
    write_atomically(given.out, lambda beside: table.to_csv(beside, index=False))
    print(f"{len(table)} predictions in {given.out}")
    return 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; any mistake of the user's is one line on stderr and exit status 2."""
    sys.exit(_guarded(arguments))


def _guarded(arguments: list[str] | None) -> int:
    try:
        given = _parser().parse_args(arguments)
        command: Command = given.command
        return command(given)
    except KeyboardInterrupt as error:
        print(f"pyro-bmrs: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        if os.environ.get("PYRO_BMRS_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"pyro-bmrs: error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    main()
