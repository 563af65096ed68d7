"""Seconds of the processor that each stage of a run takes: fit, reduction with fine-tuning, report.

    OMP_NUM_THREADS=1 python analysis/report_times.py models/lenet5.py mnist --out FOLDER [--limit 8000] [--draws 100]
        [--settings '{"epochs": 6}'] [--data-root DIR]

Makes a run in FOLDER/run and writes a row for each stage to FOLDER/times.csv: stage, seconds, and first_page, the
seconds of the clock until the report's first page stands.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from pathlib import Path

import pandas as pd
import torch

from pyro_bmrs.files import write_table
from pyro_bmrs.runs.recipe import Recipe
from pyro_bmrs.runs.run import Run
from pyro_bmrs.runs.settings import RunSettings


def first_page(path: Path, start: float, found: list[float]) -> None:
    """Note when a file is there."""
    while not path.exists():
        time.sleep(0.05)
    found.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--draws", type=int)
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of the run, as JSON")
    parser.add_argument("--data-root", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = Recipe.read(given.recipe)
    settings = RunSettings.of(recipe, given.data, {"limit": given.limit, **given.settings})
    run = Run(folder, recipe, settings, data_root=given.data_root, device="cpu", progress=False)
    rows = []
    for stage in ("fit", "reduce", "report"):
        pages: list[float] = []
        if stage == "report":
            watch = (folder / "report.html", time.perf_counter(), pages)
            threading.Thread(target=first_page, args=watch, daemon=True).start()
        start = time.process_time()
        run.report(draws=given.draws) if stage == "report" else getattr(run, stage)()
        rows.append({"stage": stage, "seconds": round(time.process_time() - start, 1)})
        time.sleep(0.1)
        rows[-1]["first_page"] = round(pages[0], 1) if pages else None
        print(rows[-1], flush=True)
    write_table(given.out / "times.csv", pd.DataFrame(rows))


if __name__ == "__main__":
    main()
