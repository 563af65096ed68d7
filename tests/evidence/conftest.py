"""The 150-digit reference and the device check live beside the distributions' tests; one thread, as there."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1] / "distributions"))
