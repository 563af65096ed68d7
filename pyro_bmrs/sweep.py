"""A sweep: one file that asks for many runs, and one table of what came out of them (docs/sweeps.md).

    seeds × data × recipes × criteria × kl_weights

Every cell is the folder of a `pyro_bmrs.runs.Run`, so a sweep that was stopped goes on where it stood.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pandas as pd
import torch
import yaml
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pyro_bmrs.files import write_atomically
from pyro_bmrs.recipes import Recipe, Settings
from pyro_bmrs.runs import FIT_FILES, Interrupted, Run

type Row = dict[str, Any]

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

_MEASURED = (
    "parameters_before", "parameters_after", "removed", "accuracy", "negative_log_likelihood", "seconds",
)  # fmt: skip
_COLUMNS = (
    "recipe", "data", "seed", "criterion", "kl_weight", "status", "error", *_MEASURED, "folder",
)  # fmt: skip
_KILLED = "its process was killed, and again when alone: for want of memory, or by a crash in a library"


# the file -------------------------------------------------------------------------------------------------


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

    def row(self, status: str, **rest: Any) -> Row:
        """A row of the results, with nothing measured but what is given."""
        settings = self.settings
        return {
            "recipe": self.recipe.as_posix(),
            "data": settings.data,
            "seed": settings.seed,
            "criterion": settings.criterion,
            "kl_weight": settings.kl_weight,
            "status": status,
            "error": "",
            **dict.fromkeys(_MEASURED, math.nan),
            "folder": self.name,
            **rest,
        }


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
        twice = [name for name, count in Counter(cell.name for cell in self.cells).items() if count > 1]
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
        """Read a study's file (docs/sweeps.md has its keys) and check all of it. Recipes are run.

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
            raise ValueError(f"study {path}: {_one_line(error)}") from error

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
        out, settings = Path(plain.pop("out")), _checked_settings(plain.pop("settings", {}))
        cells = []
        for given in recipes:
            recipe = Recipe.read(os.path.normpath(place / given))
            for values in product(*axes):
                varied = dict(zip(_AXES.values(), values, strict=True))
                chosen = Settings.of(recipe, varied.pop("data"), settings | varied)
                cells.append(Cell.of(recipe.path, chosen, out))
        return cls(out, tuple(_with_fits(cells)), **plain)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't be read ({error})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML ({error})") from error
    if not isinstance(document, dict):
        raise ValueError(f"must be a mapping of keys to values: got {type(document).__name__}")
    return document


def _check_names(what: str, given: Iterable[object], allowed: Collection[str]) -> None:
    unknown = [repr(name) for name in given if name not in allowed]
    if unknown:
        raise ValueError(f"{what} must be of {', '.join(allowed)}: got {', '.join(unknown)}")


def _check_type(what: str, value: object, allowed: Any) -> None:
    """Raise ValueError unless the value is of the type, by YAML's lights: true is no number, 3 is a float."""
    kinds = [get_origin(kind) or kind for kind in get_args(allowed) or (allowed,)]
    if type(value) not in kinds and not (float in kinds and type(value) is int):
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


def _checked_settings(given: dict[str, Any]) -> dict[str, Any]:
    _check_names("settings", given, [name for name in _SETTING_TYPES if name not in _AXES.values()])
    for name, value in given.items():
        _check_type(f"settings: {name}", value, _SETTING_TYPES[name])
    return given


def _with_fits(cells: list[Cell]) -> list[Cell]:
    """The cells with one fit for all that differ in nothing that shapes it; one that is there, if any is."""
    fits: dict[str, Path] = {}
    keys = [json.dumps([str(cell.recipe), cell.settings.of_fit()], sort_keys=True) for cell in cells]
    for key, cell in sorted(zip(keys, cells, strict=True), key=lambda pair: not _has_fit(pair[1].folder)):
        fits.setdefault(key, cell.folder)
    return [replace(cell, fit=fits[key]) for key, cell in zip(keys, cells, strict=True)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# one cell -------------------------------------------------------------------------------------------------


def _has_fit(folder: Path) -> bool:
    return all((folder / name).exists() for name in FIT_FILES)


def _copy_fit(source: Path, folder: Path) -> None:
    """Every file whole or not there; the posterior, which says that there is a fit, is the last of them."""
    for name in FIT_FILES:
        write_atomically(folder / name, partial(shutil.copyfile, source / name))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads; with jobs: 1 this is the caller's own process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(
    cell: Cell,
    place: Path,
    threads: int,
    data_root: Path | str | None,
    device: str,
    caught: tuple[type[BaseException], ...],
) -> Row:
    """The row of a cell brought to its end; in a worker, that of whatever goes wrong.

    Args:
        cell: the cell.
        place: the folder that relative paths start from: a worker may have been started elsewhere.
        threads, data_root, device: as for `run_study`.
        caught: what is made a row.
    """
    start = time.perf_counter()
    try:
        with chdir(place), _threads(threads):
            if cell.fit != cell.folder and not _has_fit(cell.folder):
                if not _has_fit(cell.fit):
                    raise ValueError(f"it shares the fit of {cell.fit.name}, which has failed")
                _copy_fit(cell.fit, cell.folder)
            recipe = Recipe.read(cell.recipe)
            run = Run(cell.folder, recipe, cell.settings, data_root=data_root, device=device, progress=False)
            if run.complete():
                return _done(cell, run)
            run.fit()
            if not run.reduced():
                run.reduce()
            run.report()
            return _done(cell, run) | {"seconds": _seconds_since(start)}
    except caught as error:
        told = f"{type(error).__name__}: {_one_line(error)}"
        return cell.row("failed", error=told, seconds=_seconds_since(start))


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _done(cell: Cell, run: Run) -> Row:
    """The row of a complete run, without the seconds."""
    table = run.evaluation()
    final = table.iloc[-1]
    return cell.row(
        "done",
        **run.outcome(),
        parameters_before=table.parameters.iloc[0],
        parameters_after=final.parameters,
        negative_log_likelihood=final.negative_log_likelihood,
    )


# many cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Worker processes.

    Attributes:
        work: what a worker does with a cell; it raises nothing.
        arguments: of `joblib.Parallel`, a fresh set for each pool.
        killed: what comes out of a pool one of whose processes has been killed.
    """

    work: Callable[[Cell], Row]
    arguments: Callable[[], dict[str, Any]]
    killed: type[Exception]

    @classmethod
    def of(cls, backend: str, work: Callable[[Cell], Row]) -> _Pool:
        if backend == "processes":
            # Ctrl-C goes to all processes of a terminal; it is the caller's to answer, who then ends the workers
            ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
            return cls(work, lambda: {"backend": "loky", **ignore}, TerminatedWorkerError)
        try:
            from ray.exceptions import RayActorError
            from ray.util.joblib.ray_backend import RayBackend
        except ImportError:
            raise ValueError("backend ray needs the extra ray: pip install 'pyro-bmrs[ray]'") from None

        def arguments() -> dict[str, Any]:
            backend = RayBackend()
            # its no to this is inherited from a backend that forks, which Ray does not
            backend.supports_return_generator = True
            return {
                "backend": backend,
                # Ray hands tasks to its processes in turn, be they busy or not: a new one never is
                "maxtasksperchild": 1,
                "ray_remote_args": {"scheduling_strategy": "SPREAD"},
            }

        return cls(work, arguments, RayActorError)

    def rows(self, cells: Iterable[Cell], jobs: int, *, again: bool = False) -> Iterator[Row]:
        """A row per cell, as they finish.

        When a process is killed, so are those beside it, and nothing says which one it was. So what they
        were at is tried again with half as many side by side, in the end alone: a cell whose process is
        killed alone has failed.
        """
        left = {cell.name: cell for cell in cells}
        while left:
            handed: list[Cell] = []
            try:
                for row in self._parallel([*left.values()], jobs, handed):
                    del left[row["folder"]]
                    yield row
            except self.killed:
                suspects = [left.pop(cell.name) for cell in handed if cell.name in left]
                if not suspects:  # what was killed had nothing of ours
                    raise
                if again and len(suspects) == 1:
                    yield suspects[0].row("failed", error=_KILLED)
                    continue
                for part in [suspects] if jobs > 2 else [[cell] for cell in suspects]:
                    yield from self.rows(part, max(2, jobs // 2), again=True)

    def _parallel(self, cells: list[Cell], jobs: int, handed: list[Cell]) -> Iterator[Row]:
        """Rows as they come; `handed` is filled with the cells that were given to the processes so far."""

        def tasks() -> Iterator[Any]:
            for cell in cells:
                handed.append(cell)
                yield delayed(self.work)(cell)

        parallel = Parallel(
            jobs, return_as="generator_unordered", pre_dispatch="n_jobs", batch_size=1, **self.arguments()
        )
        rows: Iterator[Row] = parallel(tasks())
        return rows


class _Results:
    """results.csv: a row per cell, in the order of the study whatever the order of finishing."""

    def __init__(self, study: Study) -> None:
        self.path = study.out / "results.csv"
        earlier = self._earlier()
        self.rows = {
            cell.name: cell.row("done", **earlier[cell.name]) if cell.name in earlier else cell.row("waiting")
            for cell in study.cells
        }
        self._write()

    def _earlier(self) -> dict[str, Row]:
        """What was measured of the cells that an earlier call finished, by name."""
        if not self.path.exists():
            return {}
        try:
            table = pd.read_csv(self.path)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({_one_line(error)}): move it away") from error
        if tuple(table) != _COLUMNS:
            raise ValueError(f"{self.path} must be the results of a study: move it away")
        done = table[table.status == "done"].to_dict("records")
        return {row["folder"]: {name: row[name] for name in _MEASURED} for row in done}

    def record(self, row: Row) -> None:
        """Put a row in its place. A cell that was found complete keeps the seconds that it once took."""
        if row["status"] == "done" and math.isnan(row["seconds"]):
            row = row | {"seconds": self.rows[row["folder"]]["seconds"]}
        self.rows[row["folder"]] = row
        self._write()

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows.values())

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(list(self.rows.values()), columns=list(_COLUMNS))
        return table.astype({"parameters_before": "Int64", "parameters_after": "Int64"})

    def _write(self) -> None:
        table = self.table()
        write_atomically(self.path, lambda beside: table.to_csv(beside, index=False))


class _Progress:
    """A line on stderr for each finished cell, with the time so far and an estimate of what is left."""

    def __init__(self, total: int) -> None:
        self.total, self.finished, self.worked, self.start = total, 0, 0, time.perf_counter()

    def show(self, row: Row, waiting: int) -> None:
        """Tell of a cell; `waiting` are left, reckoned to take as long as those that there was work on."""
        elapsed = time.perf_counter() - self.start
        self.finished += 1
        found = row["status"] == "done" and math.isnan(row["seconds"])
        self.worked += not found
        if row["status"] == "failed":
            told = f"failed: {row['error']}"
        else:
            told = f"{100 * row['removed']:.1f} % removed, test accuracy {100 * row['accuracy']:.2f} %, "
            told += "done before" if found else f"{row['seconds']:.0f} s"
        times = f"{_clock(elapsed)} so far"
        if waiting and self.worked:
            times += f", about {_clock(elapsed / self.worked * waiting)} left"
        print(f"[{self.finished}/{self.total}] {row['folder']}: {told}; {times}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def run_study(
    study: Study, *, data_root: Path | str | None = None, device: str = "auto", progress: bool = True
) -> pd.DataFrame:
    """Bring every cell of a study to its end, several side by side, and keep `out`/results.csv up to date.

    Cells that are complete are left as they are, interrupted ones go on, failed ones are tried again.
    Of cells that share a fit one fits, and the others get a copy of its files.

    Args:
        study: from `Study.read`.
        data_root: where the data sets are.
        device: where to compute: "auto" is the accelerator where there is one.
        progress: print a line on stderr for each finished cell.

    Returns:
        What is in results.csv: a row per cell in the order of the study, with recipe, data, seed, criterion,
        kl_weight, status ("waiting", "done" or "failed"), error (one line), parameters_before and
        parameters_after (counts), removed (1 - after/before), accuracy (0 to 1) and negative_log_likelihood
        (nats per example) of the final network on the test examples, seconds (of the call that finished the
        cell), and folder (in `out`).

    Raises:
        ValueError: if the backend is not installed, or results.csv is none of a study's.
        OSError: if `out` can't be written to.
        Interrupted: on Ctrl-C. What is finished stands; the same call goes on.
    """
    # a worker that is told to end is one cell that failed; in the caller's own process it is the caller's Ctrl-C
    caught = (Exception, SystemExit) if study.jobs == 1 else (BaseException,)
    finish = partial(
        _finish, place=Path.cwd(), threads=study.threads, data_root=data_root, device=device, caught=caught
    )
    pool, results, told = _Pool.of(study.backend, finish), _Results(study), _Progress(len(study.cells))
    # a task has one result, at its end: so that each cell has its own, the fits come first, then who shares them
    fitting = [cell for cell in study.cells if cell.fit == cell.folder]
    served = [cell for cell in study.cells if cell.fit != cell.folder]
    try:
        for row in chain(pool.rows(fitting, study.jobs), pool.rows(served, study.jobs)):
            results.record(row)
            if progress:
                told.show(row, results.count("waiting"))
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted with {results.count('done')} of {len(study.cells)} cells done, which are in "
            f"{results.path}; the same command goes on from there"
        ) from None
    return results.table()
