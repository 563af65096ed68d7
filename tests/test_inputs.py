"""Inputs that people have: docs/inputs.md, a row for each case of tests/support/input_cases.py and program_cases.py.

python tests/test_inputs.py --write
"""

import contextlib
import re
import sys
import tempfile
import warnings
from itertools import groupby
from pathlib import Path

import pyro
import pytest
import torch

if __name__ == "__main__":  # pytest knows the way to the helpers
    sys.path.insert(0, str(Path(__file__).with_name("support")))

from cells import code, shown
from input_cases import INPUT_CASES
from program_cases import PROGRAM_CASES

CASES = [*INPUT_CASES, *PROGRAM_CASES]
DOCUMENT = Path(__file__).parent.parent / "docs" / "inputs.md"
INTRODUCTION = """\
# Inputs that people have

Each row has been tried: what is given, what comes of it, and whether that had to be mended. What is refused is refused
with one line, shown here with … for what another library adds. "As it was" says that the library did so before anybody
tried. [Bring your own data and model](bring_your_own.md) says what to give.

The cases are in `tests/support/input_cases.py` and `program_cases.py`; `python tests/test_inputs.py --write` makes this
page anew from them.
"""


def outcome(case, folder):
    """The message of a case that is refused; "" where it works."""
    pyro.clear_param_store()
    with (
        contextlib.chdir(folder),
        warnings.catch_warnings(),
        torch.random.fork_rng(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            case.run()
        except Exception as error:
            if not case.refused:
                raise
            return str(error)
    return ""


@pytest.fixture(scope="module")
def tried():
    return {}


def marked(case):
    """Fits of whole programs take seconds."""
    slow = case.kind == "programs" and bool(case.works)
    return pytest.param(case, id=f"{case.kind}: {case.given}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_what_comes_of_it(case, tried, tmp_path):
    assert bool(case.works) != bool(case.refused)
    tried[case] = message = outcome(case, tmp_path)
    assert bool(message) == bool(case.refused), "it works"
    assert "\n" not in message
    assert re.search(case.refused, message), message


def test_no_two_rows_are_alike():
    rows = {(case.kind, case.given) for case in CASES}
    assert len(rows) == len(CASES) >= 120


def page(tried):
    lines = [INTRODUCTION]
    for kind, cases in groupby(CASES, key=lambda case: case.kind):
        lines += [
            f"## {kind[0].upper()}{kind[1:]}\n",
            "| what is given | what comes of it | mended, or refused how |",
            "|---|---|---|",
        ]
        for case in cases:
            seen = code(shown(tried[case], case.refused)) if case.refused else case.works.replace("|", r"\|")
            lines.append(f"| {case.given.replace('|', chr(92) + '|')} | {seen} | {case.note} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_is_what_the_cases_give(tried, tmp_path):
    for case in CASES:
        if case.refused and case not in tried:  # this test runs alone
            folder = tmp_path / str(len(tried))
            folder.mkdir()
            tried[case] = outcome(case, folder)
    assert DOCUMENT.read_text() == page(tried), "python tests/test_inputs.py --write makes it anew"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_inputs.py --write")
    torch.set_num_threads(1)
    found = {}
    for one in filter(lambda case: case.refused, CASES):
        with tempfile.TemporaryDirectory() as place:
            found[one] = outcome(one, place)
    DOCUMENT.write_text(page(found))
