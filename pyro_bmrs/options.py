"""The options of the command line: those that are settings, made from their fields, and those of several commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from pyro_bmrs.runs.settings import RunSettings


def whole(text: str) -> int:
    """An integer. Typer's own message does not say what was given."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a whole number: got {text!r}") from None


def number(text: str) -> float:
    """A floating-point number."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number: got {text!r}") from None


_METAVARS = {int: "int", float: "float", str: "str", dict: "JSON"}


def _option(name: str, whose: str) -> Any:
    """The option of a setting, with the type and the description of its field."""
    field = RunSettings.model_fields[name]
    flag = name.replace("_", "-")
    shown = field.default if name == "data" else f"the {whose}'s"
    if field.annotation is bool:
        return Annotated[
            bool | None,
            typer.Option(f"--{flag}/--no-{flag}", help=field.description, show_default=shown),
        ]

    def read(text: str) -> Any:
        try:
            return RunSettings.read(name, text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    kinds = [get_origin(kind) or kind for kind in get_args(field.annotation) or (field.annotation,)]
    metavar = "|".join(filter(None, map(_METAVARS.get, kinds))) or "|".join(get_args(field.annotation))
    if type(None) in kinds:
        metavar += "|none"
    metavar = f"<{metavar}>"
    return Annotated[
        str | None,
        typer.Option(f"--{flag}", parser=read, metavar=metavar, help=field.description, show_default=shown),
    ]


def with_settings[Command: Callable[..., Any]](
    *names: str, whose: str = "recipe"
) -> Callable[[Command], Command]:
    """Gives a command an option for each of these settings. `given_settings` reads them."""

    def give(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, whose)
            )
            for name in names
        ]
        command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return command

    return give


def given_settings(context: typer.Context) -> dict[str, Any]:
    """The settings that are on the command line, also those given as none."""
    return {
        name: value
        for name, value in context.params.items()
        if name in RunSettings.model_fields
        and getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A Python file (`pyro-bmrs new` writes one), or lenet5, lenet5_caffe, mlp, resnet, vit.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")]
Out = Annotated[Path, typer.Option(help="Folder for all results.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew if the folder holds a run.")]
PosteriorDraws = Annotated[
    int | None,
    typer.Option(
        "--draws",
        parser=whole,
        help="Posterior draws for the report's diagnosis, 100 or more; 0: leave it out.",
    ),
]
Foreign = Annotated[
    str | None,
    typer.Option(
        help="Another data set, to see if the network is less sure of it; default one that is on this machine."
    ),
]
MovedData = Annotated[
    str | None, typer.Option("--data", help="Where the run's .npz file or image folder is now, if it moved.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data sets are; default $PYRO_BMRS_DATA, else ~/.cache/pyro_bmrs.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
LoggerName = Annotated[
    str | None, typer.Option("--logger", help="csv or tensorboard: write logs/ during the fit.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        help="Raw inputs: a .npy, an .npz with x, or a folder of images; default the test examples."
    ),
]
Predictions = Annotated[
    Path, typer.Option(help="CSV to write: label, class and probability; of images also file.")
]
FoldPreprocessing = Annotated[
    bool, typer.Option("--fold-preprocessing", help="Take raw inputs of the right size, give probabilities.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        parser=number,
        help="Allowed difference of onnxruntime; default 1e-5, of float16 1e-2, of float64 1e-10.",
    ),
]
