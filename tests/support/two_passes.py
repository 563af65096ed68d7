"""A pass over the data that torchrun starts in two processes; each writes what it ended with to FOLDER/rank-N.pt."""

import os
import sys
from pathlib import Path

import torch

import pyro_bmrs as bmrs

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "fitting"))
    from test_curvature_pass import data, made, numbers

    model, guide = made()
    bmrs.fit(model, guide, tuple(part[:200] for part in data()), batch_size=50, progress=False)
    torch.save(numbers(guide), Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.pt")
