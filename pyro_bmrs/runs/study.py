"""A study: the file that asks for a sweep, checked whole before any work is done (docs/sweeps.md).

    recipes × data × kl_weights × criteria × seeds

Every combination is a cell, and every cell the folder of a `pyro_bmrs.runs.run.Run`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from pyro_bmrs.files import read_text
from pyro_bmrs.fitting.devices import PRECISIONS
from pyro_bmrs.fitting.loop import SCHEDULES
from pyro_bmrs.runs.recipe import Recipe, Settings
from pyro_bmrs.runs.folder import FIT_FILES
from pyro_bmrs.runs.shipped import find_recipe

# The axes of a study: the key in its file, and the setting that the key's values are given to.
_AXES = {"data": "data", "kl_weights": "kl_weight", "criteria": "criterion", "seeds": "seed"}
_SETTING_TYPES = get_type_hints(Settings)
_KEYS = {
    "out": str, "recipes": str, **{key: _SETTING_TYPES[name] for key, name in _AXES.items()},
    "settings": dict, "jobs": int, "threads": int, "backend": str,
}  # fmt: skip
_REQUIRED = ("out", "recipes", "data")
_BACKENDS = ("processes", "ray")
_WORDS = {
    str: "text", bool: "true or false", int: "a whole number", dict: "a mapping", type(None): "null",
    float: "a number (YAML reads 1.0e-3 as one, and 1e-3 as text)",
}  # fmt: skip
_REMOVALS = ("end", "epoch", "mask")

# What `Settings` leaves to the fit and to the reading of data, where it would be an error of every single cell.
_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("seed",), "0 or more", lambda value: value >= 0),
    (("epochs", "accumulate", "patience", "image_size"), "1 or more", lambda value: value >= 1),
    (("limit",), "2 or more", lambda value: value >= 2),
    (
        ("learning_rate", "posterior_learning_rate", "kl_weight", "weight_decay"),
        "finite and not negative",
        lambda value: 0 <= value < math.inf,
    ),
    (("gradient_clip",), "finite and positive", lambda value: 0 < value < math.inf),
    (("warm_up",), "from 0 to 1", lambda value: 0 <= value <= 1),
    (("validation_fraction",), "between 0 and 1", lambda value: 0 < value < 1),
    (("removal",), f"one of {', '.join(_REMOVALS)}", _REMOVALS.__contains__),
    (("schedule",), f"one of {', '.join(SCHEDULES)}", SCHEDULES.__contains__),
    (("precision",), f"one of {', '.join(PRECISIONS)}", PRECISIONS.__contains__),
)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        recipe: the recipe's file.
        settings: the run's settings, complete.
        folder: the run's folder; its name says recipe, data, KL weight, criterion and seed.
        fit: the folder of the cell whose fit serves this one, too; its own where it fits itself.
    """

    recipe: Path
    settings: Settings
    folder: Path
    fit: Path

    @classmethod
    def of(cls, recipe: Path, settings: Settings, out: Path) -> Cell:
        """The cell with its folder in `out`, of a name that depends on nothing but the cell itself."""
        criterion = settings.criterion.replace("=", "")
        weight = f"w{settings.kl_weight}".removesuffix(".0")
        parts = (recipe.stem, Path(settings.data).name, weight, criterion, f"seed{settings.seed}")
        folder = out / "-".join(re.sub(r"[^\w.+]+", "-", part) for part in parts)
        return cls(recipe, settings, folder, fit=folder)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def fits(self) -> bool:
        """Whether the cell makes its fit itself."""
        return self.fit == self.folder


@dataclass(frozen=True)
class Study:
    """What a study's file asks for.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp())
    >>> _ = (place / "net.py").write_text("SETTINGS = {}\\ndef network(shape, classes): ...")
    >>> lines = ["out: runs", "recipes: net.py", "data: digits", "seeds: [0, 1]", "criteria: [BMRS_N, SNR]"]
    >>> _ = (place / "study.yaml").write_text("\\n".join(lines))
    >>> study = Study.read(place / "study.yaml", jobs=2)
    >>> [cell.name for cell in study.cells][:3]
    ['net-digits-w1-BMRS_N-seed0', 'net-digits-w1-BMRS_N-seed1', 'net-digits-w1-SNR-seed0']
    >>> [cell.fit.name for cell in study.cells][:3]
    ['net-digits-w1-BMRS_N-seed0', 'net-digits-w1-BMRS_N-seed1', 'net-digits-w1-BMRS_N-seed0']

    Attributes:
        out: the folder of all that comes out.
        cells: every combination of recipe, data, KL weight, criterion and seed, in this order, the seed
            changing first.
        jobs: how many cells are worked on side by side; 1: in the calling process.
        threads: torch's threads for each of them.
        backend: "processes" of this machine, or "ray".
    """

    out: Path
    cells: tuple[Cell, ...]
    jobs: int = 1
    threads: int = 1
    backend: str = "processes"

    def __post_init__(self) -> None:
        for name in ("jobs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more: got {getattr(self, name)}")
        if self.backend not in _BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}: got {self.backend!r}")
        twice = _twice(cell.name for cell in self.cells)
        if twice:
            raise ValueError(
                f"{', '.join(('recipes', *_AXES))} must give each cell another name (files go by theirs, "
                f"without the folder): got {twice[0]} twice"
            )

    @classmethod
    def read(
        cls,
        path: Path | str,
        *,
        out: Path | str | None = None,
        jobs: int | None = None,
        backend: str | None = None,
    ) -> Study:
        """Read a study's file (docs/sweeps.md has its keys) and check all of it but data. Recipes are run.

        Args:
            path: a YAML file. Recipes in it are relative to its folder; out and data, to the current one.
            out, jobs, backend: go before what the file says; None: what the file says.

        Raises:
            ValueError: in one line, if the file or a recipe can't be read, or a key or value is none that
                is allowed.
        """
        path = Path(path)
        given = {"out": out and str(out), "jobs": jobs, "backend": backend}
        try:
            document = _read_mapping(path)
            document |= {key: value for key, value in given.items() if value is not None}
            return cls._of(document, path.parent)
        except (ValueError, TypeError) as error:
            raise ValueError(f"study {path}: {one_line(error)}") from error

    @classmethod
    def _of(cls, document: dict[str, Any], place: Path) -> Study:
        _check_names("keys", document, _KEYS)
        missing = [key for key in _REQUIRED if key not in document]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given: got {', '.join(document) or 'no key'}")
        recipes = _values(document, "recipes")
        axes = [_values(document, key) for key in _AXES]
        plain = {key: value for key, value in document.items() if key not in (*_AXES, "recipes")}
        for key, value in plain.items():
            _check_type(key, value, _KEYS[key])
        out, settings = Path(plain.pop("out")), plain.pop("settings", {})
        _check_names("settings", settings, [name for name in _SETTING_TYPES if name not in _AXES.values()])
        for name, value in settings.items():
            _check_type(f"settings: {name}", value, _SETTING_TYPES[name])
        cells = []
        for given in recipes:
            recipe = Recipe.read(os.path.normpath(find_recipe(given, place)))
            for data, *values in product(*axes):
                varied = dict(zip([*_AXES.values()][1:], values, strict=True))
                # null is a value here, where the recipe says otherwise
                chosen = replace(Settings.of(recipe, data, varied), **settings)
                _check_values(chosen)
                cells.append(Cell.of(recipe.path, chosen, out))
        return cls(out, tuple(_with_fits(cells)), **plain)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't be read ({error})") from error
    try:
        # a few lines of them stand for more than any memory holds
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("must have no aliases (*name)")
        document, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not YAML ({error})") from error
    if not isinstance(document, dict) or node is None:
        raise ValueError(f"must be a mapping of keys to values: got {type(document).__name__}")
    # safe_load takes the last of two equal keys, and says nothing
    for mapping in (node, *(value for _, value in node.value)):
        twice = _twice(str(key.value) for key, _ in mapping.value) if mapping.tag.endswith(":map") else []
        if twice:
            raise ValueError(f"keys must be given once: got {twice[0]!r} twice")
    return document


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _check_names(what: str, given: Iterable[object], allowed: Collection[str]) -> None:
    unknown = [repr(name) for name in given if name not in allowed]
    if unknown:
        raise ValueError(f"{what} must be of {', '.join(allowed)}: got {', '.join(unknown)}")


def _check_type(what: str, value: object, allowed: Any) -> None:
    """Raise ValueError unless the value is of the type, by YAML's lights: true is no number, 3 is a float."""
    kinds = tuple(get_origin(kind) or kind for kind in get_args(allowed) or (allowed,))
    fitting = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, fitting) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{what} must be {' or '.join(_WORDS[kind] for kind in kinds)}: got {value!r}")


def _values(document: dict[str, Any], key: str) -> list[Any]:
    """The values of a key that takes one or a list; [None], the recipe's own, if it is not there."""
    if key not in document:
        return [None]
    values = document[key] if isinstance(document[key], list) else [document[key]]
    if not values:
        raise ValueError(f"{key} must have one value or more: got []")
    for value in values:
        _check_type(f"each of {key}", value, _KEYS[key])
    return values


def _check_values(settings: Settings) -> None:
    """Raise ValueError for a setting of a cell, the recipe's or the file's, that a fit would refuse."""
    whole = asdict(settings)
    for name, value in whole.items():
        _check_type(name, value, _SETTING_TYPES[name])
    for names, words, allows in _RULES:
        for name in names:
            if whole[name] is not None and not allows(whole[name]):
                raise ValueError(f"{name} must be {words}: got {whole[name]!r}")


def _with_fits(cells: list[Cell]) -> list[Cell]:
    """The cells with one fit for all that differ in nothing that shapes it; one that is there, if any is."""
    fits: dict[str, Path] = {}
    keys = [json.dumps([str(cell.recipe), cell.settings.of_fit()], sort_keys=True) for cell in cells]
    for key, cell in sorted(zip(keys, cells, strict=True), key=lambda pair: not has_fit(pair[1].folder)):
        fits.setdefault(key, cell.folder)
    return [replace(cell, fit=fits[key]) for key, cell in zip(keys, cells, strict=True)]


def has_fit(folder: Path) -> bool:
    """Whether the folder holds all that a fit leaves."""
    return all((folder / name).exists() for name in FIT_FILES)


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
