"""The recipes that come with the package, found by name, and the one to start from."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from shutil import copyfile

from pyro_bmrs.files import write_atomically

STARTER = "starter"
_DEFINES_NETWORK = re.compile(r"^def network\(", re.MULTILINE)


def shipped_recipes() -> dict[str, Path]:
    """The files by name, from models/ in an installed package or beside it in a checkout. None is run.

    >>> sorted(shipped_recipes())
    ['lenet5', 'lenet5_caffe', 'mlp', 'resnet', 'starter', 'vit']
    """
    package = Path(__file__).parents[1]
    inside = package / "models"
    folder = inside if inside.is_dir() else package.parent / "models"
    # The other files are Pyro programs without a network.
    return {
        path.stem: path
        for path in sorted(folder.glob("*.py"))
        if _DEFINES_NETWORK.search(path.read_text(encoding="utf-8"))
    }


def find_recipe(given: Path | str, place: Path | None = None) -> Path:
    """The file of a recipe: a path that ends in .py, or the name of a recipe that comes with the package.

    Args:
        given: a path or a name.
        place: the folder that a relative path starts from; None: the current one.

    Raises:
        ValueError: for a name that no recipe has.
    """
    path = Path(given)
    if path.suffix == ".py":
        return path if place is None else place / path
    known = shipped_recipes()
    if str(given) not in known:
        raise ValueError(
            f"recipe must be a Python file, whose name ends in .py, or one of {', '.join(known)}: got {given}"
        )
    return known[str(given)]


def write_starter(path: Path) -> Path:
    """Write the recipe to start from.

    Raises:
        ValueError: if the path does not end in .py, or something is there already.
    """
    if path.suffix != ".py":
        raise ValueError(f"recipe must be a file whose name ends in .py: got {path}")
    if path.exists():
        raise ValueError(f"recipe must be a new file: {path} is there already")
    return write_atomically(path, partial(copyfile, shipped_recipes()[STARTER]))
