"""What a notebook shows of our objects: small HTML in the notebook's own colours, without a script."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pyro_bmrs.numerals import finite, number, percent

# More rows than this are for the object's tables.
MOST_ROWS = 16
_LINE = "1px solid rgba(128,128,128,.3)"


def card(title: str, *parts: str) -> str:
    """A title, and below it parts that are HTML.

    >>> card("Fit of <3> epochs", lines("all fine"))
    '<div><b>Fit of &lt;3&gt; epochs</b><div>all fine</div></div>'
    """
    return f"<div><b>{escape(title)}</b>{''.join(parts)}</div>"


def lines(*told: str) -> str:
    """Lines of text."""
    return "".join(f"<div>{escape(line)}</div>" for line in told)


def grid(
    columns: Sequence[tuple[str, str, str]], rows: Iterable[Mapping[Any, Any]], most: int = MOST_ROWS
) -> str:
    """A table of the first rows, which says how many more there are. Columns without any value are left out.

    >>> print(grid([("layer", "layer", "text"), ("left", "left", "bar")], [{"layer": "conv<1>", "left": 0.25}]))
    ... # doctest: +ELLIPSIS
    <table ...conv&lt;1&gt;...width:25%...25.0 %...

    Args:
        columns: key, label and kind: "text", "%" for a share, "bar" for one that is drawn too, or a number's format.
    """
    every = list(rows)
    shown = [column for column in columns if any(_says(row, column) for row in every)]
    head = "".join(_cell("th", escape(label), kind) for _, label, kind in shown)
    body = "".join(
        f"<tr>{''.join(_cell('td', _shown(row.get(key), kind), kind) for key, _, kind in shown)}</tr>"
        for row in every[:most]
    )
    more = len(every) - most
    rest = lines(f"… and {more:,} more") if more > 0 else ""
    return (
        f'<table style="color:inherit;border-collapse:collapse;margin:.4em 0"><thead><tr style="border-bottom:{_LINE}">'
        f"{head}</tr></thead><tbody>{body}</tbody></table>{rest}"
    )


def folded(summary: str, content: str) -> str:
    """Content that a click shows."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _says(row: Mapping[Any, Any], column: tuple[str, str, str]) -> bool:
    value = row.get(column[0])
    return value not in ("", None) if column[2] == "text" else finite(value) is not None


def _cell(tag: str, content: str, kind: str) -> str:
    side = "left" if kind in ("text", "bar") else "right"
    return f'<{tag} style="text-align:{side};padding:.1em .7em">{content}</{tag}>'


def _shown(value: Any, kind: str) -> str:
    if kind == "text":
        return escape("" if value is None else str(value))
    if kind == "%":
        return percent(value)
    if kind != "bar":
        return number(value, kind)
    share = min(max(finite(value) or 0.0, 0.0), 1.0)
    full = "display:inline-block;width:6em;height:.6em;background:rgba(128,128,128,.25);margin-right:.6em"
    part = f"display:block;height:100%;width:{100 * share:.4g}%;background:#3b82c4"
    return f'<span style="{full}"><span style="{part}"></span></span>{percent(value)}'
