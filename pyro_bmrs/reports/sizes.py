"""What the page's slider over budgets needs: networks of all sizes, each as it was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

    from pyro_bmrs.quality import Frontier

# Of a layer with more structures the slider shows the count alone.
MOST_CELLS = 2000
_MARKS = {
    "is_plan": "as decided",
    "is_evidence": "the evidence's own choice",
    "is_one_standard_error": "the smallest within one standard error of the least loss",
}


def slider(found: Frontier, before: int, command: str, named: Mapping[str, Sequence[str]]) -> Markup:
    """JSON, safe inside a script element.

    Args:
        found: of the plan on the page.
        before: parameters of the full network.
        command: makes the network of a size; "{}" stands for its parameters.
        named: names of a layer's structures, where they have any.
    """
    from markupsafe import Markup

    table = found.plans[0].table
    layers = [
        {
            "name": layer,
            "units": [*named.get(str(layer), rows.unit.tolist())],
            "cells": len(rows) <= MOST_CELLS,
        }
        for layer, rows in table.groupby("layer", sort=False)
    ]
    # JSON knows no NaN
    columns = ["parameters", "multiply_accumulates", "milliseconds", "loss", "accuracy", "rmse"]
    rows = [
        {name: value if math.isfinite(value) else None for name, value in row.items()}
        for row in found.table[columns].astype(float).to_dict("records")
    ]
    sizes = [{**row, "kept": kept} for row, kept in zip(rows, found.kept(), strict=True)]
    places = {
        name: int(found.table[column].to_numpy(dtype=bool).argmax())
        for column, name in _MARKS.items()
        if found.table[column].any()
    }
    data = {"before": before, "command": command, "layers": layers, "sizes": sizes, "marks": places}
    # inside a script element only "<" could end it
    return Markup(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
