"""The Pyro programs in models/, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "models"


def model_file(name: str) -> ModuleType:
    """The module models/NAME.py."""
    specification = importlib.util.spec_from_file_location(f"model_file_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
