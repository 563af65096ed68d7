"""A sweep: the runs that a study asks for, side by side, and one table of what came out (docs/sweeps.md).

Every cell is the folder of a `pyro_bmrs.runs.run.Run`, so a sweep that was stopped goes on where it stood.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import chdir, closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pyro_bmrs.data import DataError, load_data
from pyro_bmrs.files import held, write_atomically, write_table
from pyro_bmrs.networks.modes import torch_threads
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.folder import FIT_FILES
from pyro_bmrs.runs.run import Interrupted, Run
from pyro_bmrs.runs.study import Cell, Study, has_fit, one_line

type Row = dict[str, Any]

_MEASURED = (
    "parameters_before", "parameters_after", "removed", "accuracy", "negative_log_likelihood", "seconds",
)  # fmt: skip
_COLUMNS = (
    "recipe", "data", "seed", "criterion", "kl_weight", "status", "error", *_MEASURED, "folder",
)  # fmt: skip
_KILLED = "its process was killed, and again when alone: for want of memory, or by a crash in a library"


def _row(cell: Cell, status: str, **rest: Any) -> Row:
    """A row of the results, with nothing measured but what is given."""
    settings = cell.settings
    return {
        "recipe": cell.recipe.as_posix(),
        "data": settings.data,
        "seed": settings.seed,
        "criterion": settings.criterion,
        "kl_weight": settings.kl_weight,
        "status": status,
        "error": "",
        **dict.fromkeys(_MEASURED, math.nan),
        "folder": cell.name,
        **rest,
    }


# one cell -------------------------------------------------------------------------------------------------


def _copy_fit(source: Path, folder: Path) -> None:
    """Every file whole or not there; the posterior, which says that there is a fit, is the last of them."""
    for name in FIT_FILES:
        write_atomically(folder / name, partial(shutil.copyfile, source / name))


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
        with chdir(place), torch_threads(threads):  # with jobs: 1 these are the caller's own
            if not cell.fits and not has_fit(cell.folder):
                if not has_fit(cell.fit):
                    raise ValueError(f"it shares the fit of {cell.fit.name}, which has failed")
                _copy_fit(cell.fit, cell.folder)
            recipe = Recipe.read(cell.recipe)
            run = Run(cell.folder, recipe, cell.settings, data_root=data_root, device=device, progress=False)
            worked = run.finish(draws=0)  # `pyro-bmrs report` makes the diagnosis of the cells that matter
            return _done(cell, run, _seconds_since(start) if worked else math.nan)
    except caught as error:
        told = f"{type(error).__name__}: {one_line(error)}"
        return _row(cell, "failed", error=told, seconds=_seconds_since(start))


def _seconds_since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _done(cell: Cell, run: Run, seconds: float) -> Row:
    """The row of a complete run."""
    table = run.evaluation()
    final = table.iloc[-1]
    return _row(
        cell,
        "done",
        **run.outcome(),
        parameters_before=table.parameters.iloc[0],
        parameters_after=final.parameters,
        negative_log_likelihood=final.negative_log_likelihood,
        seconds=seconds,
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
    killed: tuple[type[Exception], ...]

    @classmethod
    def of(cls, study: Study, device: str, work: Callable[[Cell], Row]) -> _Pool:
        if study.backend == "processes":
            # Ctrl-C goes to all processes of a terminal; it is the caller's to answer, who then ends the workers
            ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
            return cls(work, lambda: {"backend": "loky", **ignore}, (TerminatedWorkerError,))
        try:
            import ray
            from ray.exceptions import OutOfMemoryError, RayActorError
            from ray.util.joblib.ray_backend import RayBackend
        except ImportError:
            raise ValueError("backend ray needs the extra ray: pip install 'pyro-bmrs[ray]'") from None
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="warning")
        there = ray.cluster_resources()
        # a worker without a GPU of its own would take the first of its node, as all others there would
        needed = "GPU" if there.get("GPU") and device != "cpu" else "CPU"
        if study.jobs > there.get(needed, 0):
            raise ValueError(
                f"jobs must be at most the {there.get(needed, 0):g} {needed}s of the Ray cluster: got {study.jobs}"
            )
        options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
        if needed == "GPU":
            options |= {"num_gpus": 1, "num_cpus": 0}

        def arguments() -> dict[str, Any]:
            backend = RayBackend()
            # its no to this is inherited from a backend that forks, which Ray does not
            backend.supports_return_generator = True
            # Ray hands tasks to its processes in turn, be they busy or not: a new one never is
            return {"backend": backend, "maxtasksperchild": 1, "ray_remote_args": options}

        return cls(work, arguments, (RayActorError, OutOfMemoryError))

    def rows(self, cells: Iterable[Cell], jobs: int) -> Iterator[Row]:
        """A row per cell, as they finish.

        When a process is killed, so are those beside it, and nothing says which one it was. So what they
        were at is tried again in the end, each alone in a fresh pool: a cell whose process is then killed
        has failed.
        """
        left = {cell.name: cell for cell in cells}
        again: list[Cell] = []
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
                again += suspects
        for cell in again:
            try:
                # two processes, as joblib does the work of a single one in the caller's own
                yield from self._parallel([cell], 2, [])
            except self.killed:
                yield _row(cell, "failed", error=_KILLED)

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
        waiting = {"status": "waiting"}
        self.rows = {cell.name: _row(cell, **earlier.get(cell.name, waiting)) for cell in study.cells}

    def _earlier(self) -> dict[str, Row]:
        """What was measured of the cells that an earlier call finished, by name."""
        if not self.path.exists():
            return {}
        try:
            table = pd.read_csv(self.path)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged ({one_line(error)}): move it away") from error
        if tuple(table) != _COLUMNS:
            raise ValueError(f"{self.path} must be the results of a study: move it away")
        done = table[table.status == "done"].to_dict("records")
        return {row["folder"]: {name: row[name] for name in ("status", *_MEASURED)} for row in done}

    def record(self, row: Row) -> None:
        """Put a row in its place. A cell that was found complete keeps the seconds that it once took."""
        if row["status"] == "done" and math.isnan(row["seconds"]):
            row = row | {"seconds": self.rows[row["folder"]]["seconds"]}
        self.rows[row["folder"]] = row
        self.write()

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows.values())

    def table(self) -> pd.DataFrame:
        table = pd.DataFrame(list(self.rows.values()), columns=list(_COLUMNS))
        return table.astype({"parameters_before": "Int64", "parameters_after": "Int64"})

    def write(self) -> None:
        write_table(self.path, self.table())


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


def _check_data(cells: Iterable[Cell], data_root: Path | str | None) -> None:
    """Read each data set once: what is wrong is said before any work, and no two workers download it at once."""
    whole = {
        (s.data, s.image_size, s.limit, s.validation_fraction) for s in (cell.settings for cell in cells)
    }
    for name, image_size, limit, fraction in sorted(whole, key=str):
        try:
            load_data(
                name, data_root=data_root, image_size=image_size, limit=limit, validation_fraction=fraction
            )
        except DataError as error:
            raise ValueError(f"data {name!r} can't be used: {error}") from error


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
        ValueError: if a data set can't be read, the backend is not installed or too small for `jobs`, or
            results.csv is none of a study's, or another process works in `out`; before any work.
        OSError: if `out` can't be written to.
        Interrupted: on Ctrl-C. What is finished stands; the same call goes on.
    """
    with held("out", study.out):
        return _run_study(study, data_root, device, progress)


def _run_study(study: Study, data_root: Path | str | None, device: str, progress: bool) -> pd.DataFrame:
    # a worker that is told to end is one cell that failed; in the caller's own process it is the caller's Ctrl-C
    caught = (Exception, SystemExit) if study.jobs == 1 else (BaseException,)
    finish = partial(
        _finish, place=Path.cwd(), threads=study.threads, data_root=data_root, device=device, caught=caught
    )
    results = _Results(study)
    _check_data((cell for cell in study.cells if results.rows[cell.name]["status"] != "done"), data_root)
    pool, told = _Pool.of(study, device, finish), _Progress(len(study.cells))
    results.write()

    def rows() -> Generator[Row]:
        # a task has one result, at its end: so that each cell has its own, the fits come first, then who shares them
        yield from pool.rows([cell for cell in study.cells if cell.fits], study.jobs)
        yield from pool.rows([cell for cell in study.cells if not cell.fits], study.jobs)

    with warnings.catch_warnings(), closing(rows()) as finished:
        # joblib's word on work that is left when it is closed: Interrupted has a better one
        warnings.filterwarnings("ignore", r"\d+ tasks ", module="joblib")
        try:
            for row in finished:
                results.record(row)
                if progress:
                    told.show(row, results.count("waiting"))
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted with {results.count('done')} of {len(study.cells)} cells done, which are in "
                f"{results.path}; the same command goes on from there"
            ) from None
    return results.table()
