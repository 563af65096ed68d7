"""A study: the file that asks for a sweep, checked as a whole before any work is done (docs/sweeps.md).

    recipes × data × kl_weights × criteria × seeds

Every combination is a cell, and every cell the folder of a `pyro_bmrs.runs.run.Run`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from pyro_bmrs.arguments import check
from pyro_bmrs.data.arrays import one_line
from pyro_bmrs.files import read_text
from pyro_bmrs.fitting.settings import Checked
from pyro_bmrs.runs.folder import FIT_FILES
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.settings import RunSettings
from pyro_bmrs.runs.shipped import find_recipe

# The axes of a study: the key in its file, and the setting that takes the key's values.
_AXES = {"data": "data", "kl_weights": "kl_weight", "criteria": "criterion", "seeds": "seed"}
_BACKENDS = ("processes", "ray")

type _OneOrMore[Value] = Annotated[
    list[Value],
    Field(min_length=1),
    BeforeValidator(lambda values: values if isinstance(values, list) else [values]),
]


class _Document(Checked):
    """The keys of a study's file. If an axis is left out, the recipe decides the setting."""

    out: str
    recipes: _OneOrMore[str]
    data: _OneOrMore[str]
    kl_weights: _OneOrMore[float | Literal["auto"]] = Field(default_factory=list)
    criteria: _OneOrMore[str] = Field(default_factory=list)
    seeds: _OneOrMore[int] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    jobs: int = 1
    threads: int = 1
    backend: str = "processes"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        recipe: the recipe's file.
        settings: the run's settings, complete.
        folder: the run's folder; its name says recipe, data, KL weight and criterion or weights, and seed.
        fit: the folder of the cell whose fit this one uses; its own folder if it makes the fit.
    """

    recipe: Path
    settings: RunSettings
    folder: Path
    fit: Path

    @classmethod
    def of(cls, recipe: Path, settings: RunSettings, out: Path) -> Cell:
        """The cell with its folder in `out`. The folder's name depends on the cell alone."""
        posterior = f"w{settings.kl_weight}".removesuffix(".0"), settings.criterion.replace("=", "")
        if settings.weights is not None:
            posterior = "weights", Path(settings.weights).stem
        parts = (recipe.stem, Path(settings.data).name, *posterior, f"seed{settings.seed}")
        folder = out / "-".join(re.sub(r"[^\w.+]+", "-", part) for part in parts)
        return cls(recipe, settings, folder, fit=folder)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def fits(self) -> bool:
        """Whether the cell makes its own fit."""
        return self.fit == self.folder


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp())
    >>> _ = (place / "net.py").write_text("SETTINGS = {}\\ndef network(shape, classes): ...")
    >>> lines = ["out: runs", "recipes: net.py", "data: digits", "seeds: [0, 1]", "criteria: [BMRS_N, SNR]"]
    >>> _ = (place / "study.yaml").write_text("\\n".join(lines))
    >>> study = Study.read(place / "study.yaml", jobs=2)
    >>> [cell.name for cell in study.cells][:3]
    ['net-digits-wauto-BMRS_N-seed0', 'net-digits-wauto-BMRS_N-seed1', 'net-digits-wauto-SNR-seed0']
    >>> [cell.fit.name for cell in study.cells][:3]
    ['net-digits-wauto-BMRS_N-seed0', 'net-digits-wauto-BMRS_N-seed1', 'net-digits-wauto-BMRS_N-seed0']

    Attributes:
        out: the folder of all that comes out.
        cells: every combination of recipe, data, KL weight, criterion and seed; the seed changes fastest.
        jobs: how many cells run at the same time; 1: in the calling process.
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
            check(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        check(self.backend in _BACKENDS, "backend", f"one of {', '.join(_BACKENDS)}", self.backend)
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
            out, jobs, backend: replace those of the file; None: those of the file.

        Raises:
            ValueError: in one line, if the file or a recipe can't be read, or a key or value is not allowed.
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
        _check_names("keys", document, _Document.model_fields)
        asked = _Document(**document)
        axes = {name: getattr(asked, key) for key, name in _AXES.items() if getattr(asked, key)}
        free = [name for name in RunSettings.model_fields if name not in _AXES.values()]
        _check_names("settings", asked.settings, free)
        cells = []
        for given in asked.recipes:
            recipe = Recipe.read(os.path.normpath(find_recipe(given, place)))
            for values in product(*axes.values()):
                varied = dict(zip(axes, values, strict=True))
                settings = RunSettings.of(recipe, varied.pop("data"), {**asked.settings, **varied})
                cells.append(Cell.of(recipe.path, settings, Path(asked.out)))
        cells = _with_fits(cells)
        return cls(Path(asked.out), tuple(cells), asked.jobs, asked.threads, asked.backend)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't be read ({error})") from error
    try:
        # A few lines of aliases can expand to more than any memory holds.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise ValueError("must have no aliases (*name)")
        document, node = yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not YAML ({error})") from error
    if not isinstance(document, dict) or node is None:
        raise ValueError(f"must be a mapping of keys to values: got {type(document).__name__}")
    # safe_load silently takes the last of two equal keys.
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


def _with_fits(cells: list[Cell]) -> list[Cell]:
    """The cells with one shared fit for all with the same settings of the fit. An existing fit is preferred."""
    fits: dict[str, Path] = {}
    keys = [json.dumps([str(cell.recipe), cell.settings.of_fit()], sort_keys=True) for cell in cells]
    for key, cell in sorted(zip(keys, cells, strict=True), key=lambda pair: not has_fit(pair[1].folder)):
        fits.setdefault(key, cell.folder)
    return [replace(cell, fit=fits[key]) for key, cell in zip(keys, cells, strict=True)]


def has_fit(folder: Path) -> bool:
    """Whether the folder holds all that a fit leaves."""
    return all((folder / name).exists() for name in FIT_FILES)
