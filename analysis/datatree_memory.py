"""Peak memory and time of `to_datatree` and of saving it: LeNet5 on the MNIST test images, from a finished run.

    pyro-bmrs run models/lenet5.py --data mnist --out runs/mnist
    python analysis/datatree_memory.py runs/mnist --draws 1000

Each row of the CSV is measured in a process of its own, so that its peak is not that of the row before.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import pyro_bmrs as bmrs
from pyro_bmrs.runs.run import Run

OUT = Path(__file__).parent / "results" / "datatree_memory"


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(folder: Path, draws: int, batch_size: int) -> dict[str, float]:
    torch.set_num_threads(1)
    run = Run(folder, progress=False)
    run.load_posterior()
    before, start = peak_bytes(), time.perf_counter()
    tree = bmrs.to_datatree(run.model, run.guide, run.dataset.test, draws=draws, batch_size=batch_size)
    built, seconds = peak_bytes(), time.perf_counter() - start
    with tempfile.TemporaryDirectory() as place:
        path = bmrs.save_datatree(tree, Path(place) / "tree.nc")
        saved, size = peak_bytes(), path.stat().st_size
        assert bmrs.load_datatree(path).identical(tree)
    return dict(
        draws=draws, examples=len(run.dataset.test), batch_size=batch_size,
        gib_before=before / 2**30, gib_built=built / 2**30, gib_saved=saved / 2**30,
        gib_of_tree=sum(group.nbytes for group in tree.children.values()) / 2**30, gib_of_file=size / 2**30,
        seconds=seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a finished run on MNIST")
    parser.add_argument("--draws", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(
            pd.DataFrame([measure(given.folder, given.draws[0], given.batch_size)]).to_csv(index=False),
            end="",
        )
        return
    rows = []
    for draws in given.draws:
        options = [str(given.folder), "--draws", str(draws), "--batch-size", str(given.batch_size), "--one"]
        done = subprocess.run(
            [sys.executable, __file__, *options], capture_output=True, text=True, check=True
        )
        names, values = done.stdout.strip().splitlines()[-2:]
        rows.append(dict(zip(names.split(","), map(float, values.split(",")), strict=True)))
        OUT.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(4).to_csv(OUT / "datatree_memory.csv", index=False)
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
