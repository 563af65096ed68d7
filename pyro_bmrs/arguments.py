"""The one way in which an argument is refused: its name, what is allowed, what was given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def check(good: bool, name: str, allowed: str, given: object, kind: type[Exception] = ValueError) -> None:
    """Raise unless `good`.

    >>> check(True, "draws", "positive", 1)
    >>> check(False, "draws", "positive", -1)
    Traceback (most recent call last):
        ...
    ValueError: draws must be positive: got -1

    Args:
        good: whether the value is allowed.
        name: of the argument.
        allowed: what would be, in words that follow "must be".
        given: what was passed; or its type, for what is too long to show.
        kind: of the exception.
    """
    if not good:
        raise kind(
            f"{name} must be {allowed}: got {given.__name__ if isinstance(given, type) else repr(given)}"
        )


def name_of(value: object) -> str:
    """The text of a value; of one that has none of its own, such as a function, its qualified name.

    It is the same in every process: an address is no part of it.

    >>> name_of("BMRS_N"), name_of(len), name_of(math.floor)
    ('BMRS_N', 'builtins.len', 'math.floor')
    """
    text = str(value)
    if " at 0x" not in text and not text.startswith("<"):
        return text
    named: Any = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def on_a_screen(text: str, lines: int = 24) -> str:
    """The text for a notebook, which shows what a cell ends with: the first lines, and how to see the others.

    >>> on_a_screen("a\\nb\\nc", lines=2)
    'a\\n… and 2 more lines: print it'
    """
    parts = text.split("\n")
    if len(parts) <= lines:
        return text
    return "\n".join([*parts[: lines - 1], f"… and {len(parts) - lines + 1} more lines: print it"])


def is_floor(value: object, least: int = 1) -> bool:
    """Whether it says how many stay at least: an integer, `least` or more, or a share between 0 and 1."""
    return is_whole(value, least) or (isinstance(value, Real) and 0 < float(value) < 1)


def is_whole(value: object, least: int = 0) -> bool:
    """Whether it is an integer, `least` or more, which may be one of NumPy's. True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def whole_number(name: str, value: object, least: int = 0, kind: type[Exception] = ValueError) -> int:
    """An integer as Python's own, for torch takes none of NumPy's.

    >>> import numpy
    >>> whole_number("draws", numpy.int64(3), 1)
    3

    Raises:
        kind: unless it is `least` or more, and below 2**63, where torch's integers end.
    """
    check(is_whole(value, least), name, f"an integer of at least {least}", value, kind)
    number = int(value)  # type: ignore[call-overload]
    check(number < 2**63, name, "below 2**63", value, kind)
    return number  # type: ignore[no-any-return]


def is_number(value: object) -> bool:
    """Whether it is a finite number, which may be one of NumPy's. True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """A number as Python's own, for JSON knows none of NumPy's; also those of a mapping. None stays.

    >>> import numpy
    >>> plain(numpy.int64(3)), plain({"macs": numpy.float32(0.5)}), plain(None)
    (3, {'macs': 0.5}, None)
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    return int(value) if isinstance(value, Integral) else float(value)
