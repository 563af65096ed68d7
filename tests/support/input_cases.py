"""Inputs that people have: what is given, and what comes of it. `tests/test_inputs.py` tries each case."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class InputCase:
    """An input, and what comes of it.

    Attributes:
        kind: what is given: "data", "labels", "networks", …
        given: the input, in a few words.
        run: does it, and asserts what `works` says.
        works: what happens, in a few words; "" where the input is refused.
        refused: a regular expression for the one line of the ValueError or TypeError; "" where it works.
        note: what was mended, or how the refusal comes.
    """

    kind: str
    given: str
    run: Callable[[], object]
    works: str = ""
    refused: str = ""
    note: str = "as it was"


INPUT_CASES: list[InputCase] = []
