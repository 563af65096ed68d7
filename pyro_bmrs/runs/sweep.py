"""A sweep: the runs of a study, several at a time, and one table of their results (docs/sweeps.md).

Every cell is the folder of a `pyro_bmrs.runs.run.Run`, so a sweep that was stopped goes on from there.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import chdir, closing
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from joblib.externals.loky import ProcessPoolExecutor

from pyro_bmrs.data.arrays import one_line
from pyro_bmrs.files import held, write_atomically, write_table
from pyro_bmrs.fitting.checkpoints import stage_files
from pyro_bmrs.networks.modes import torch_threads
from pyro_bmrs.progress import Progress
from pyro_bmrs.runs.folder import FIT_FILES, STAGES
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.study import Cell, Study, has_fit
from pyro_bmrs.runs.workplace import Interrupted, dataset_of

type Row = dict[str, Any]

_MEASURED = (
    "parameters_before", "parameters_after", "removed", "accuracy", "negative_log_likelihood", "seconds",
)  # fmt: skip
_COLUMNS = (
    "recipe", "data", "seed", "criterion", "kl_weight", "status", "error", *_MEASURED, "folder",
)  # fmt: skip
_KILLED = (
    "its process was killed, by a lack of memory or a crash in a library; the same command goes on with it"
)


def _row(cell: Cell, status: str, **rest: Any) -> Row:
    """A row of the results. What is not given in `rest` counts as not measured."""
    settings, fitted = cell.settings, cell.settings.weights is None
    return {
        "recipe": cell.recipe.as_posix(),
        "data": settings.data,
        "seed": settings.seed,
        "criterion": settings.criterion if fitted else "",
        "kl_weight": settings.kl_weight if fitted else math.nan,
        "status": status,
        "error": "",
        **dict.fromkeys(_MEASURED, math.nan),
        "folder": cell.name,
        **rest,
    }


# one cell -------------------------------------------------------------------------------------------------


def _copy_fit(source: Path, folder: Path) -> None:
    """Copy the files of a fit. The posterior, which marks a folder that holds a fit, is the last."""
    stages = [path.relative_to(source).as_posix() for path in stage_files(source / "checkpoints" / "fit")]
    there = [name for name in (STAGES, *stages) if (source / name).exists()]
    for name in (*there, *FIT_FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, partial(shutil.copyfile, source / name))


def _finish(
    cell: Cell,
    place: Path,
    threads: int,
    data_root: Path | str | None,
    device: str,
    caught: tuple[type[BaseException], ...],
) -> Row:
    """Finish a cell; returns its row, also if it fails.

    Args:
        cell: the cell.
        place: the folder that relative paths start from: a worker may have been started elsewhere.
        threads, data_root, device: as for `run_study`.
        caught: the errors that become a row.
    """
    start = time.perf_counter()
    try:
        with chdir(place), torch_threads(threads):  # with jobs: 1 in the caller's process
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


def _rows(
    work: Callable[[Cell], Row], groups: Iterable[Iterable[Cell]], jobs: int, start: Callable[[], Any]
) -> Generator[Row]:
    """A row per cell, as they finish. A group begins when the one before is done.

    Args:
        work: what a worker does with a cell; it raises nothing.
        groups: the cells.
        jobs: how many run at the same time.
        start: makes a worker, an executor with one process. If that is killed, it is clear which cell it was at.
    """
    idle: list[Any] = []
    busy: dict[Future[Row], tuple[Cell, Any]] = {}
    try:
        for cells in groups:
            waiting = deque(cells)
            while waiting or busy:
                while waiting and len(busy) < jobs:
                    cell, worker = waiting.popleft(), idle.pop() if idle else start()
                    busy[worker.submit(work, cell)] = cell, worker
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    cell, worker = busy.pop(future)
                    lost = future.exception()
                    if lost is None:
                        idle.append(worker)
                        yield future.result()
                    else:
                        worker.shutdown(kill_workers=True)
                        yield _row(cell, "failed", error=f"{_KILLED} ({type(lost).__name__})")
    finally:
        for worker in (*idle, *(worker for _, worker in busy.values())):
            worker.shutdown(kill_workers=True)


def _workers(study: Study, device: str) -> Callable[[], Any]:
    """A function that starts a worker of the study's backend."""
    if study.backend == "ray":
        return _ray_workers(study.jobs, device)
    return partial(
        ProcessPoolExecutor, 1, env={"OMP_NUM_THREADS": str(study.threads)},
        # Ctrl-C reaches all processes of a terminal. The caller answers it, and ends the workers.
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip


def _ray_workers(jobs: int, device: str) -> Callable[[], Any]:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ValueError("backend ray needs the extra ray: pip install 'pyro-bmrs[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    there = ray.cluster_resources()
    # Workers without a GPU of their own would all take the first of their node.
    needed = "GPU" if there.get("GPU") and device != "cpu" else "CPU"
    if jobs > there.get(needed, 0):
        raise ValueError(
            f"jobs must be at most the {there.get(needed, 0):g} {needed}s of the Ray cluster: got {jobs}"
        )
    resources = {"num_gpus": 1, "num_cpus": 0} if needed == "GPU" else {"num_cpus": 1}
    # Ray retries a cell once if its process or node is lost. Each cell has a process of its own.
    options = {"scheduling_strategy": "SPREAD", "max_retries": 1, "max_calls": 1, **resources}
    task = ray.remote(**options)(lambda work, cell: work(cell))

    class Worker:
        def submit(self, work: Callable[[Cell], Row], cell: Cell) -> Future[Row]:
            self.result = task.remote(work, cell)
            future: Future[Row] = self.result.future()
            return future

        def shutdown(self, **_: bool) -> None:
            ray.cancel(self.result, force=True)

    return Worker


class _Results:
    """results.csv: a row per cell, in the order of the study whatever the order of finishing."""

    def __init__(self, study: Study) -> None:
        self.path = study.out / "results.csv"
        earlier = self._earlier()
        waiting = {"status": "waiting"}
        self.rows = {cell.name: _row(cell, **earlier.get(cell.name, waiting)) for cell in study.cells}

    def _earlier(self) -> dict[str, Row]:
        """The measurements of the cells that an earlier call finished, by name."""
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
        """Put a row in its place. A cell that was complete before keeps its seconds."""
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


def _show(progress: Progress, row: Row) -> None:
    """Show a finished cell."""
    found = row["status"] == "done" and math.isnan(row["seconds"])
    if found:
        progress.resume(1)
    else:
        progress.advance()
    if row["status"] == "failed":
        told = f"failed: {row['error']}"
    else:
        told = f"{100 * row['removed']:.1f} % removed, test accuracy {100 * row['accuracy']:.2f} %, "
        told += "done before" if found else f"{row['seconds']:.0f} s"
    progress.say(f"[{progress.done}/{progress.total}] {row['folder']}: {told}")


def _check_data(cells: Iterable[Cell], data_root: Path | str | None) -> None:
    """Read each data set once: errors come before any work, and no two workers download it at the same time."""
    different = {
        (s.data, s.image_size, s.limit, s.validation_fraction): s for s in (cell.settings for cell in cells)
    }
    for settings in different.values():
        dataset_of(settings, data_root)


def run_study(
    study: Study, *, data_root: Path | str | None = None, device: str = "auto", progress: bool = True
) -> pd.DataFrame:
    """Finish every cell of a study, several at a time, and keep `out`/results.csv up to date.

    Complete cells stay as they are, interrupted ones go on, failed ones are tried again. Of cells that share a fit
    one makes it, and the others get a copy of its files.

    Args:
        study: from `Study.read`.
        data_root: where the data sets are.
        device: where to compute; "auto": the accelerator if there is one.
        progress: print a line on stderr for each finished cell, and on a terminal a bar below them.

    Returns:
        The content of results.csv: a row per cell in the order of the study, with recipe, data, seed, criterion,
        kl_weight, status ("waiting", "done" or "failed"), error (one line), parameters_before and
        parameters_after (counts), removed (1 - after/before), accuracy (0 to 1) and negative_log_likelihood
        (nats per example) of the final network on the test examples, seconds (of the call that finished the
        cell), and folder (in `out`).

    Raises:
        ValueError: if a data set can't be read, the backend is not installed or too small for `jobs`, or
            results.csv is not that of a study, or another process works in `out`; before any work.
        OSError: if `out` can't be written to.
        Interrupted: on Ctrl-C. What is finished is kept; the same call goes on.
    """
    with held("out", study.out):
        return _run_study(study, data_root, device, progress)


def _run_study(study: Study, data_root: Path | str | None, device: str, progress: bool) -> pd.DataFrame:
    # A worker that is told to end is one failed cell. In the caller's own process it is the caller's Ctrl-C.
    caught = (Exception, SystemExit) if study.jobs == 1 else (BaseException,)
    finish = partial(
        _finish, place=Path.cwd(), threads=study.threads, data_root=data_root, device=device, caught=caught
    )
    results = _Results(study)
    done = {name: row["status"] == "done" for name, row in results.rows.items()}
    _check_data((cell for cell in study.cells if not done[cell.name]), data_root)
    start = _workers(study, device)
    results.write()
    # Finished cells come first, so that the time left is that of the others. All fits come before the cells that
    # share them.
    cells = sorted(study.cells, key=lambda cell: not done[cell.name])
    groups = [[cell for cell in cells if cell.fits is fits] for fits in (True, False)]
    rows = (
        _rows(finish, groups, study.jobs, start) if study.jobs > 1 else (finish(c) for g in groups for c in g)
    )
    with closing(rows), Progress("cells", len(cells), shown=progress) as shown:
        try:
            for row in rows:
                results.record(row)
                _show(shown, row)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted with {results.count('done')} of {len(study.cells)} cells done, which are in "
                f"{results.path}; the same command goes on from there"
            ) from None
    return results.table()
