"""Numbers as people read them."""

from __future__ import annotations

import math


def finite(value: object) -> float | None:
    """Return a number, or None for anything that is not a finite one (None, NaN, pandas.NA, a text)."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def number(value: object, pattern: str = ".4g") -> str:
    number = finite(value)
    return "–" if number is None else format(number, pattern)


def with_error(value: object, error: object) -> str:
    """A number with its standard error: two digits of it, or all before the point, at most four behind it.

    >>> with_error(-2716.96, 553.1), with_error(-128.146, 5.44), with_error(1.5, 0.0), with_error(1.5, None)
    ('-2,717 ± 553', '-128.1 ± 5.4', '1.5000 ± 0.0000', '1.5000 ± –')
    """
    number, deviation = finite(value), finite(error)
    if number is None:
        return "–"
    decimals = min(max(0, 1 - math.floor(math.log10(deviation))), 4) if deviation else 4
    told = "–" if deviation is None else f"{deviation:,.{decimals}f}"
    return f"{number:,.{decimals}f} ± {told}"


def nats(value: object, error: object) -> str:
    """A loss with its standard error, where it is known.

    >>> nats(0.1913, 0.0067), nats(0.1913, float("nan"))
    ('0.1913 ± 0.0067', '0.1913')
    """
    return number(value, ".4f") if finite(error) is None else with_error(value, error)


def percent_with_error(value: object, error: object, decimals: int = 2) -> str:
    """A fraction with its standard error, both in per cent, the error in two digits; without one as `percent` has it.

    >>> percent_with_error(0.98864, 0.00106), percent_with_error(0.9, 0.03), percent_with_error(0.5, None)
    ('98.86 ± 0.11 %', '90.0 ± 3.0 %', '50.00 %')
    """
    number, deviation = finite(value), finite(error)
    if number is None or not deviation:
        return percent(value, decimals)
    decimals = min(max(1 - math.floor(math.log10(100 * deviation)), 0), 4)
    return f"{100 * number:.{decimals}f} ± {100 * deviation:.{decimals}f} %"


def percent(value: object, decimals: int = 1) -> str:
    """Print a fraction in per cent, with more decimals where rounding would claim all or nothing."""
    number = finite(value)
    if number is None:
        return "–"
    text = f"{100 * number:.{decimals}f}"
    while float(text) in (0.0, 100.0) and 100 * number not in (0.0, 100.0) and decimals < 6:
        decimals += 1
        text = f"{100 * number:.{decimals}f}"
    return f"{text} %"


def plain_number(value: object) -> str:
    """A number with all its digits, to sort by and to write to CSV; nothing for what is none."""
    number = finite(value)
    return "" if number is None else f"{number:.10g}"
