"""From a template and figures to one page that needs nothing else."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyro_bmrs.diagnostics.report_text import khat_text, khat_value, markdown, number, percent, plain_number

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure


def encoded(text: str) -> bytes:
    """As UTF-8; a lone surrogate in a user's text has none, and a question mark is better than no report."""
    return text.encode("utf-8", "replace")


def environment(*, html: bool) -> Environment:
    """The templates of this room, escaping for HTML, or with the filter ``md`` for Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("pyro_bmrs.diagnostics"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=number,
        percent=percent,
        plain=plain_number,
        md=markdown,
        khat=khat_text,
        khat_value=khat_value,
    )
    return made


def svg(name: str, draw: Callable[[], Figure]) -> Markup:
    """Draw a figure as an SVG element whose identifiers are unique in the page."""
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"pyro_bmrs {name}"}), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the reader's browser.
        warnings.filterwarnings("ignore", message="Glyph")
        # No metadata: it would hold the date, and addresses.
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw().savefig(buffer, format="svg", dpi=200, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]

    def prefixed(tag: re.Match[str]) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag[0])

    # Only within tags: in the text "<" and ">" are escaped, so no layer's name can look like one.
    return Markup(re.sub(r"<[^>]*>", prefixed, drawing))
