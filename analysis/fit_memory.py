"""Peak memory of a step of a fit against a step of training without noise.

    OMP_NUM_THREADS=1 python analysis/fit_memory.py [--out FOLDER]

Counts the bytes of all tensors alive, by torch's profiler, over one step of each: parameters, gradients and
Adam's moments, which are there before it, and the most that the step itself holds at once. Writes
fit_memory.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from step_times import kinds
from torch.profiler import ProfilerActivity, profile

from pyro_bmrs.files import write_atomically

NAMES = ("LeNet5", "ResNet-18")
KINDS = ("plain", "ours", "ours, a draw per example", "site by site, in Pyro's ELBO")


def peak(step: Callable[[], None]) -> int:
    """Most bytes that a step holds at once beyond what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def standing(step: Callable[[], None]) -> int:
    """Bytes of the parameters and of Adam's state, that stay between steps."""
    optimizer = next(
        cell.cell_contents
        for cell in step.__closure__ or ()
        if isinstance(cell.cell_contents, torch.optim.Optimizer)
    )
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fit_memory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in NAMES:
        steps = kinds(name)
        for kind in KINDS:
            steps[kind]()
            steps[kind]()
            rows.append(
                {"network": name, "kind": kind, "peak_bytes": standing(steps[kind]) + peak(steps[kind])}
            )
            plain = next(row["peak_bytes"] for row in rows if row["network"] == name)
            rows[-1]["ratio"] = round(rows[-1]["peak_bytes"] / plain, 3)
    table = pd.DataFrame(rows)
    write_atomically(given.out / "fit_memory.csv", lambda beside: table.to_csv(beside, index=False))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
