"""From a template and figures to one page that needs nothing else."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_bmrs.files import write_atomically
from pyro_bmrs.numerals import finite, nats, number, percent, percent_with_error, plain_number, with_error
from pyro_bmrs.reports.words import khat_text, khat_value, markdown

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure


def write_page(out: Path, template: str, content: Mapping[str, Any]) -> Path:
    """Fill in a template, and write the HTML to `out` and the Markdown beside it; neither before both are made.

    Args:
        template: its name, without .html.j2 and .md.j2.
    """
    texts = {
        path: _environment(html=kind == "html").get_template(f"{template}.{kind}.j2").render(content)
        for path, kind in ((out.with_suffix(".md"), "md"), (out, "html"))
    }
    for path, text in texts.items():
        # a lone surrogate in a user's text has no UTF-8, and a question mark is better than no report
        encoded = text.encode("utf-8", "replace")
        write_atomically(path, lambda beside, encoded=encoded: beside.write_bytes(encoded))  # type: ignore[misc]
    return out


def _environment(*, html: bool) -> Environment:
    """The templates of this room, escaping for HTML, or with the filter ``md`` for Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pyro_bmrs.reports"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.tests["finite"] = lambda value: finite(value) is not None
    made.filters.update(
        nats=nats,
        number=number,
        percent=percent,
        percent_with_error=percent_with_error,
        saved=saved,
        told=told,
        plain=plain_number,
        md=markdown,
        khat=khat_text,
        khat_value=khat_value,
        with_error=with_error,
    )
    return made


def saved(row: Mapping[str, Any]) -> str:
    """The share of a cost that is saved, of times with its error; "none" of equal costs."""
    return "none" if row["removed"] == 0 else percent_with_error(row["removed"], row["error"], 1)


def told(
    columns: Sequence[tuple[str, str, str]], rows: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """The columns of a table that say something in any row."""

    def says(key: str, kind: str) -> bool:
        if kind == "text":
            return any(row[key] != "" for row in rows)
        return kind == "khat" or any(finite(row.get(key)) is not None for row in rows)

    return [column for column in columns if not rows or says(column[0], column[2])]


def svg(name: str, draw: Callable[..., Figure], *given: Any) -> Markup:
    """What `draw(*given)` draws as an SVG element, whose identifiers are unique in the page."""
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"pyro_bmrs {name}"}), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the reader's browser.
        warnings.filterwarnings("ignore", message="Glyph")
        # No metadata: it would hold the date, and addresses.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(*given).savefig(buffer, format="svg", dpi=200, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]

    def prefixed(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])

    # Only within tags: in the text "<" and ">" are escaped, so no layer's name can look like one.
    return Markup(re.sub(r"<[^>]*>", prefixed, drawing))
