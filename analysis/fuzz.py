"""Every parser against files that nobody should have written.

    OMP_NUM_THREADS=1 python analysis/fuzz.py [--inputs 100000] [--seed 0] [--out FOLDER]

tries so many in all, evenly over the formats of tests/support/fuzzing.py, and writes fuzz.csv: format, inputs, read,
refused, seconds, longest (seconds for one input), memory (MiB of growth after the first tenth). Anything but a
ValueError, more than 5 s for one input, or more than 100 MiB of growth ends it with the input in failed.bin.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests" / "support"))
from fuzzing import Target, attempt, prepared, temporary  # noqa: E402

from pyro_bmrs.files import write_atomically, write_table  # noqa: E402

MEMORY = 100.0


def memory() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def tried(name: str, target: Target, inputs: int, first_seed: int, out: Path) -> dict[str, object]:
    """A row for one format."""
    counts, begin = [0, 0], time.perf_counter()
    longest, settled = 0.0, 0.0
    batch = 1000

    def one(content: bytes) -> None:
        nonlocal longest
        start = time.perf_counter()
        try:
            counts[attempt(target, content)] += 1
        except BaseException:
            write_atomically(out / "failed.bin", lambda beside: beside.write_bytes(content))
            raise
        longest = max(longest, time.perf_counter() - start)

    number = 0
    while sum(counts) < inputs:
        # in batches with a seed each: Hypothesis keeps a record of all it has tried

        @seed(first_seed * 1_000_003 + number)
        @settings(
            max_examples=batch, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )  # fmt: skip
        @given(st.data())
        def some(data: st.DataObject) -> None:
            one(data.draw(target.inputs))

        some()
        number += 1
        if settled == 0.0 and sum(counts) >= inputs / 10:
            settled = memory()
        print(f"\r{name}: {sum(counts):,} of {inputs:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    grown = memory() - settled
    if grown > MEMORY:
        raise MemoryError(f"{name}: memory grew by {grown:.0f} MiB, allowed {MEMORY:g}")
    return {
        "format": name, "inputs": sum(counts), "read": counts[1], "refused": counts[0],
        "seconds": round(time.perf_counter() - begin, 1), "longest": round(longest, 3), "memory": round(grown, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fuzz")
    given_ = parser.parse_args()
    rows = []
    with temporary() as folder:
        formats = prepared(Path(folder))
        for name, target in formats.items():
            rows.append(tried(name, target, -(-given_.inputs // len(formats)), given_.seed, given_.out))
            write_table(given_.out / "fuzz.csv", pd.DataFrame(rows))
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
