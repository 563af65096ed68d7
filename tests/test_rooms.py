"""The rooms of the house: what may know what (docs/architecture.md). Read from the imports, wherever they stand."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pyro_bmrs

PACKAGE = Path(pyro_bmrs.__file__).parent
# From the bottom up. An arrow never runs up; those of one line know nothing of each other.
FLOORS = (
    ("arguments", "files", "numerals", "progress", "tables"),
    ("notebooks",),
    ("distributions",),
    ("evidence", "networks", "data"),
    ("inference", "figures"),
    ("pruning",),
    ("programs",),
    ("fitting",),
    ("checks",),
    ("quality",),
    ("reports",),
    ("runs",),
    ("options",),
    ("cli",),
)


def arrows():
    """By module: the modules of the package that it imports, inside functions and for types too."""
    paths = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    names = {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}
    found = {}
    for name, path in names.items():
        asked = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_bmrs."):
                module = node.module.removeprefix("pyro_bmrs.")
                inside = {f"{module}.{alias.name}" for alias in node.names} & names.keys()
                asked |= inside or {module}
        found[name] = asked - {name}
    del found["__init__"]
    return found


def test_every_file_is_in_a_room():
    rooms = {name for floor in FLOORS for name in floor}
    assert {module.split(".")[0] for module in arrows()} == rooms


def test_no_arrow_runs_up():
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for module, asked in arrows().items():
        room = module.split(".")[0]
        for other in asked:
            there = other.split(".")[0]
            if there != room and floor_of[there] >= floor_of[room]:
                wrong.append(f"{module} -> {other}")
    assert not wrong, sorted(wrong)


def test_no_files_form_a_circle():
    # a package's __init__ only passes names on
    files = {module: asked for module, asked in arrows().items() if "." in module or len(asked) < 20}
    assert list(TopologicalSorter(files).static_order())


def test_the_map_names_every_file():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    # of the figures, a file a picture, the page names what they share alone
    unnamed = [
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if f"`{path.name}`" not in page and (path.parent.name != "figures" or path.name == "style.py")
    ]
    assert not unnamed
