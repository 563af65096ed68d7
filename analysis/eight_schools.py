"""ΔF of the eight schools along the scale of tau's prior: by the guide, by the model itself, and exactly.

    OMP_NUM_THREADS=1 python analysis/eight_schools.py

Writes results/gallery/eight_schools.csv: scale (of the reduced HalfCauchy prior of tau; 5 is the model's), by_guide,
by_model, standard_error, exact (nats), warned (whether `reduce` warns), seconds (of the clock; the fit not counted).
"""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pyro.distributions as dist
import torch
from evidence_conscience import asked, fitted, known
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_bmrs.files import write_table

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def main() -> None:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    guide = fitted(AutoMultivariateNormal, known.schools, known.EFFECTS)
    print(f"fit: {time.perf_counter() - begin:.1f} s")
    full, rows = known.schools_log_evidence(), []
    for scale in SCALES:
        begin = time.perf_counter()
        checked, warned = asked(known.schools, guide, {"tau": dist.HalfCauchy(scale)}, known.EFFECTS)
        found = checked.iloc[0]
        rows.append(
            {
                "scale": scale, "by_guide": found.log_evidence_change, "by_model": found.checked,
                "standard_error": found.standard_error, "exact": known.schools_log_evidence(tau_scale=scale) - full,
                "warned": bool(warned), "seconds": time.perf_counter() - begin,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows).round(4)
    print(table.to_string(index=False))
    write_table(Path(__file__).parent / "results" / "gallery" / "eight_schools.csv", table)


if __name__ == "__main__":
    main()
