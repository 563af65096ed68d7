"""What bad input is answered with: docs/errors.md, a row for each case of tests/support/error_cases.py.

python tests/test_errors.py --write
"""

import contextlib
import io
import re
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

if __name__ == "__main__":  # pytest knows the way to the helpers
    sys.path.insert(0, str(Path(__file__).with_name("support")))

from cells import code, shown
from error_cases import SECTIONS, WARNS, WORKS, make_place

import pyro_bmrs as bmrs
from pyro_bmrs import cli

CASES = [case for cases in SECTIONS.values() for case in cases]
DOCUMENT = Path(__file__).parent.parent / "docs" / "errors.md"
PREFIX = "pyro-bmrs: error: "
# What the library gives back, or is told by; nobody calls them.
NOT_CALLED = {"ImportanceEstimate", "__version__"}
INTRODUCTION = """\
# What bad input is answered with

Each row has been tried: what is called, what is wrong with it, and the first line that is then seen, with … for what
another library or the system adds. A mistake on the command line is one line on stderr and exit status 2. In the last
column, *yes* says that the folder held afterwards, byte for byte, what it held before, and nothing else; – that no file
has a part in it, or that the work goes on.

The cases are in `tests/support/error_cases.py`; `python tests/test_errors.py --write` makes this page anew from them.
"""


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        ended: the type of the exception, the exit status, "works" or "warning".
        message: of the exception or the warning, or what a command wrote to stderr.
        lost, added: files that are not what they were, or not there; and those that were not there before.
    """

    ended: object
    message: str
    lost: list
    added: list


def snapshot(folder):
    """The bytes of each file below a folder, by name; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


class Bench:
    """Where cases are tried, each once, in a copy of a folder that is made once."""

    def __init__(self, base):
        self.original, self.place, self.tried = base / "original", base / "place", {}
        self.original.mkdir()
        with contextlib.chdir(self.original), contextlib.redirect_stdout(io.StringIO()):
            make_place()

    def outcome(self, case):
        if case not in self.tried:
            if case.disk:
                shutil.copytree(self.original, self.place)
            else:
                self.place.mkdir()
            try:
                with contextlib.chdir(self.place), pytest.MonkeyPatch.context() as patch:
                    self.tried[case] = self.outcome_here(case, patch)
            finally:
                shutil.rmtree(self.place)
        return self.tried[case]

    def outcome_here(self, case, patch):
        if case.spoil:
            case.spoil()
        if case.missing:
            patch.setitem(sys.modules, case.missing, None)
        before, stderr = snapshot(self.place), io.StringIO()
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(stderr),
            warnings.catch_warnings(record=True) as caught,
            torch.random.fork_rng(),
        ):
            warnings.simplefilter("always")
            torch.manual_seed(0)
            try:
                result = case.provoke()
            except Exception as error:
                ended, message = type(error), str(error)
            else:
                ended, message = (result if isinstance(result, int) else WORKS), stderr.getvalue()
        if ended == WORKS and caught:
            ended, message = WARNS, str(caught[0].message)
        after = snapshot(self.place)
        lost = [name for name, content in before.items() if after.get(name, ...) != content]
        return Outcome(ended, message, lost, sorted(after.keys() - before.keys()))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("errors"))


def goes_on(case):
    """Whether this is no mistake after all."""
    return case.ends in (WORKS, WARNS, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.called}: {case.wrong}")
def test_what_is_wrong_is_said_and_nothing_is_lost(case, bench):
    outcome = bench.outcome(case)
    if isinstance(case.ends, type):
        assert isinstance(outcome.ended, type), outcome
        assert issubclass(outcome.ended, case.ends), outcome
    else:
        assert outcome.ended == case.ends, outcome
    message = outcome.message
    if case.ends == 2:
        assert message.startswith(PREFIX)
        assert message.endswith("\n")
        assert message.count("\n") == 1
        message = message.removeprefix(PREFIX)
    assert re.search(case.says, message.strip()), message
    if not goes_on(case):
        assert (outcome.lost, outcome.added) == ([], [])
    elif case.ends != WARNS:
        assert outcome.lost == []


def test_no_two_rows_are_alike():
    rows = [(case.called, case.wrong) for case in CASES]
    assert len(set(rows)) == len(rows) >= 130


def test_every_public_name_and_every_command_is_tried():
    called = {word for case in CASES for word in re.findall(r"\w+", case.called)}
    raised = {case.ends.__name__ for case in CASES if isinstance(case.ends, type)}
    assert set(bmrs.__all__) - called - raised == NOT_CALLED
    assert set(typer.main.get_command(cli.app).commands) <= called


# --- the page -------------------------------------------------------------------------------------------


def row(case, outcome):
    line = shown(outcome.message, case.says)
    ended = outcome.ended
    cells = (
        code(case.called),
        case.wrong.replace("|", r"\|"),
        code(line) if line else "–",
        code(ended.__name__) if isinstance(ended, type) else f"status {ended}" if isinstance(ended, int) else ended,
        "yes" if case.disk and not goes_on(case) and not outcome.lost + outcome.added else "–",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(bench):
    lines = [INTRODUCTION]
    for title, cases in SECTIONS.items():
        lines += [
            f"## {title}\n",
            "| what is called | what is wrong | what is seen | exception or exit status | nothing lost |",
            "|---|---|---|---|---|",
            *(row(case, bench.outcome(case)) for case in cases),
            "",
        ]
    return "\n".join(lines)


def test_the_page_is_what_the_cases_give(bench):
    made = page(bench)
    assert not re.search(r"0x[0-9a-f]{4}|/tmp|\bat 0x", made)
    assert str(bench.place) not in made
    assert DOCUMENT.read_text() == made, "python tests/test_errors.py --write makes it anew"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_errors.py --write")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        DOCUMENT.write_text(page(Bench(Path(folder))))
