"""A Matplotlib figure that a notebook shows without pyplot."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Drawing(Figure):
    """A figure whose axes are `axes`, as of any Matplotlib figure, and which a cell of a notebook may end with."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()
