"""The frontier of a plan: what networks of all sizes would lose, and which sizes stand out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.files import read_table, write_table
from pyro_bmrs.networks.cost import latency_milliseconds
from pyro_bmrs.networks.inputs import repeated
from pyro_bmrs.notebooks import card, grid
from pyro_bmrs.progress import bar
from pyro_bmrs.pruning.budgets import Costs, first, one_standard_error
from pyro_bmrs.tables import FRONTIER_COLUMNS, require_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_bmrs.inference.batches import Data
    from pyro_bmrs.inference.evaluate import Evaluation
    from pyro_bmrs.pruning import NetworkPlan


@dataclass(frozen=True, eq=False)
class Frontier:
    """What networks of all sizes lose and cost: see `frontier`.

    Attributes:
        table: a row per network, the largest first: structures, parameters, multiply_accumulates (of one example),
            milliseconds (of one example; NaN: not measured), loss (nats per example) with its standard_error, accuracy
            (0 to 1; NaN without classes), rmse (of a `Regressor`, in its `unit`; else NaN); and which is_plan,
            is_evidence (the evidence's own choice) and is_one_standard_error (the smallest with a loss within one
            standard error of the least).
        plans: of the rows.
        budget: what the plan was asked for.
    """

    table: pd.DataFrame
    plans: tuple[NetworkPlan, ...] = field(repr=False)
    budget: Mapping[str, float]

    def _repr_html_(self) -> str:
        columns = [
            ("parameters", "parameters", ",.0f"), ("multiply_accumulates", "multiply-adds", ",.0f"),
            ("milliseconds", "ms", ".4g"), ("loss", "loss (nats)", ".4f"), ("accuracy", "accuracy", "%"),
            ("rmse", "RMSE", ".4g"), ("mark", "", "text"),
        ]  # fmt: skip
        marks = {
            "is_plan": "the plan",
            "is_evidence": "evidence's choice",
            "is_one_standard_error": "one standard error",
        }
        rows = [
            {**row, "mark": ", ".join(name for mark, name in marks.items() if row[mark])}
            for row in self.table.to_dict("records")
        ]
        return card(f"{len(rows)} networks, each measured", grid(columns, rows))

    def kept(self) -> list[str]:
        """Of each row a digit for each structure in the order of the plan's table: 1 where it is kept."""
        return ["".join("01"[not removed] for removed in plan.table.removed.tolist()) for plan in self.plans]

    def save(self, path: Path | str) -> Path:
        """Write the table to a CSV file, with what is `kept` in a column of that name."""
        return write_table(Path(path), self.table.assign(kept=self.kept()))

    @classmethod
    def load(cls, path: Path | str, plan: NetworkPlan) -> Frontier:
        """What `save` wrote, of the same plan.

        Raises:
            ValueError: if the file is none, or of another plan.
        """
        try:
            table = read_table(Path(path), ("kept",))
            require_columns("it", table, (*FRONTIER_COLUMNS, "kept"))
            removed = [[digit == "0" for digit in kept] for kept in table.kept]
            if any(len(row) != len(plan.table) for row in removed):
                raise ValueError("it belongs to another plan")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        rule = replace(plan.rule, threshold=None, budget={})
        plans = [
            plan if own else replace(plan, table=plan.table.assign(removed=row), rule=rule, _cuts=None)
            for row, own in zip(removed, table.is_plan, strict=True)
        ]
        return cls(table.drop(columns="kept"), tuple(plans), plan.rule.budget)

    def plot(self) -> Figure:
        """Draw it: see `pyro_bmrs.figures.plot_frontier`."""
        from pyro_bmrs.figures.frontier import plot_frontier

        return plot_frontier(self.table, self.budget)


def frontier(
    plan: NetworkPlan, data: Data, *, points: int = 20, seconds: float = 4.0, progress: bool = True
) -> Frontier:
    """Loss, accuracy and costs of networks from the full one to the smallest, without any training.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model)
    >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
    >>> _ = guide(x, y)
    >>> found = bmrs.frontier(bmrs.reduce(model, guide), (x, y), points=3, seconds=0, progress=False)
    >>> list(found.table.parameters)
    [67, 35, 11]

    Structures are removed in the orders that `NetworkPlan.within` tries for a number of parameters; at each size the
    order with the least loss counts.

    Args:
        plan: of `reduce` or `within`, with its network.
        data: (x, y) that were not used for the fit, as for `evaluate`.
        points: how many sizes, evenly spread; the plan's own and the evidence's choice are further rows.
        seconds: for all timings together, interleaved in one process; they are NaN if they would take longer. 0: none.
        progress: show a bar, on a terminal.

    Raises:
        TypeError, ValueError: for a bad argument, or a plan without its network.
    """
    from pyro_bmrs.pruning import NetworkPlan

    check(isinstance(plan, NetworkPlan), "plan", "a NetworkPlan", type(plan), TypeError)
    check(is_whole(points, 2), "points", "an integer of at least 2", points)
    check(is_number(seconds) and seconds >= 0, "seconds", "a number of 0 or more", seconds)
    paths = [*plan.paths({"parameters"}, progress)]

    @cache
    def at(number: int, steps: int) -> NetworkPlan:
        return paths[number].plan(steps)

    @cache
    def size(number: int, steps: int) -> int:
        return at(number, steps).parameters_left()

    def fits(number: int, most: float, steps: int) -> bool:
        return size(number, steps) <= most

    largest, smallest = size(0, 0), min(size(number, path.steps) for number, path in enumerate(paths))
    asked = [largest - (largest - smallest) * place / (points - 1) for place in range(points)]
    found: list[tuple[Evaluation, NetworkPlan]] = []
    own = plan.by_evidence()
    extra = [one for one in (plan, own) if one is not None]
    with bar("frontier", points + len(extra), shown=None if progress else False) as advance:
        for most in asked:
            tried = []
            for number, path in enumerate(paths):
                steps = first(path.steps, partial(fits, number, most))
                if fits(number, most, steps):
                    tried.append((at(number, steps).evaluated(data), at(number, steps)))
            found.append(min(tried, key=lambda one: one[0].loss))
            advance(1)
        for one in extra:
            found.append((one.evaluated(data), one))
            advance(1)
    return _made(found, plan, own, seconds)


def _made(
    found: list[tuple[Evaluation, NetworkPlan]], plan: NetworkPlan, own: NetworkPlan | None, seconds: float
) -> Frontier:
    binding = plan._bound()
    costs = Costs(binding, ["parameters", "macs"], 1)
    networks = [costs.network(one.cuts) for _, one in found]
    times = [math.nan] * len(found)
    if seconds:
        times = latency_milliseconds(networks, repeated(binding.example_input, 1), seconds=seconds)
    rows = []
    for (seen, one), network, time in zip(found, networks, times, strict=True):
        cost = costs.of_network(network)
        rows.append(
            {
                "structures": int((~one.table.removed).sum()), "parameters": int(cost["parameters"]),
                "multiply_accumulates": int(cost["macs"]), "milliseconds": time, "loss": seen.loss,
                "standard_error": seen.standard_error, "accuracy": seen.accuracy, "rmse": seen.rmse,
                "is_plan": one is plan, "is_evidence": one is own, "plan": one,
            }
        )  # fmt: skip
    # the plan and the evidence's choice may be one of the sizes, and one another
    table = pd.DataFrame(rows)
    marks = table.groupby(["parameters", "loss"])[["is_plan", "is_evidence"]].transform("any")
    table = table.assign(**marks).drop_duplicates(["parameters", "loss"])
    table = table.sort_values(["parameters", "loss"], ascending=[False, True], ignore_index=True)
    smallest = one_standard_error(
        table.loss.tolist(), table.standard_error.tolist(), table.parameters.tolist()
    )
    table["is_one_standard_error"] = table.index == smallest
    return Frontier(table.drop(columns="plan"), tuple(table.plan), plan.rule.budget)
