"""The 150-digit reference lives beside the distributions' tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributions"))
