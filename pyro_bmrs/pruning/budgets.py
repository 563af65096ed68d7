"""Plans within a budget: so small, with so little work, or losing so little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from torch import nn

from pyro_bmrs.arguments import check, is_number
from pyro_bmrs.inference.batches import Data
from pyro_bmrs.networks.attention import join_attention, separate_attention
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.cost import file_bytes, latency_milliseconds, multiply_accumulates, parameters
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.inputs import call, repeated
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.rule import Rule
from pyro_bmrs.pruning.sizes import Sizes

# What a budget may name: costs, which fall as structures leave, and losses, which rise.
COSTS = ("parameters", "macs", "bytes", "milliseconds")
LOSSES = ("accuracy_drop", "loss_rise")
# For the timings of one network.
_SECONDS = 1.0
# What rounding may add: 98 less 97.5 is a little more than 0.5.
_NEAR = 1e-9


@dataclass(frozen=True)
class Path[P]:
    """Plans that remove one structure more each.

    Attributes:
        steps: how many structures can be removed.
        plan: the plan without the first n.
    """

    steps: int
    plan: Callable[[int], P]


def check_budget(budget: Mapping[str, float | None], data: Data | None) -> dict[str, float]:
    """What was asked for. Raises ValueError or TypeError, naming the argument."""
    asked = {name: value for name, value in budget.items() if value is not None}
    check(bool(asked), "a budget", f"one of {', '.join((*COSTS, *LOSSES))}", "none")
    for name, value in asked.items():
        good = is_number(value) and (value > 0 or (name in LOSSES and value >= 0))
        what = "a positive number" if name in COSTS else "a number, not negative"
        check(good, name, f"{what}; below 1 a share of the full network's" if name in COSTS else what, value)
    check(
        data is not None or not set(asked) & set(LOSSES),
        "data",
        "(x, y) to look at losses on",
        data,
        TypeError,
    )
    return asked


class Costs:
    """What smaller networks of one network cost.

    Args:
        binding: of the network.
        names: of the costs that are asked for.
        batch: examples at once, where time counts.
    """

    def __init__(self, binding: Binding, names: list[str], batch: int) -> None:
        self.binding, self.names, self.batch = binding, names, batch

    def of_full(self) -> dict[str, float]:
        """Of the original network."""
        return self._of(self.binding.full_network()) if self.names else {}

    @cached_property
    def _separated(self) -> nn.Module:
        network = self.binding.full_network()
        separate_attention(network)
        return network

    def of_cuts(self, cuts: Cuts | None) -> dict[str, float]:
        """Of the original network after these cuts; parameters alone are counted without cutting."""
        assert cuts is not None
        if self.names == ["parameters"]:
            return {"parameters": cuts.parameters_left(self._separated)}
        network = copied(self._separated)
        cuts.cut(network)
        join_attention(network)
        return self._of(network)

    def _of(self, network: nn.Module) -> dict[str, float]:
        inputs = self.binding.example_input
        network.eval()

        def milliseconds() -> float:
            x = repeated(inputs, self.batch)
            with torch.no_grad():
                call(network, x)  # the first pass may prepare much
            time = latency_milliseconds([network], x, seconds=_SECONDS)[0]
            return latency_milliseconds([network], x, repeats=3)[0] if math.isnan(time) else time

        ways: dict[str, Callable[[], float]] = {
            "parameters": lambda: parameters(network),
            "macs": lambda: multiply_accumulates(network, inputs),
            "bytes": lambda: file_bytes(network),
            "milliseconds": milliseconds,
        }
        return {name: ways[name]() for name in self.names}


def within[P](
    paths: Iterable[Path[P]],
    allowed: Mapping[str, float],
    costs: Callable[[P], Mapping[str, float]],
    lost: Callable[[P], Mapping[str, float]],
    loss: Callable[[P], float],
    size: Callable[[P], float],
) -> P:
    """The plan that meets a budget: see `NetworkPlan.within`.

    Args:
        paths: one for each order that is to be tried. Of plans that meet the costs the one with the least loss is
            taken; of those that lose as little as is allowed the smallest.
        allowed: by name, at most.
        costs: of a plan, those that are asked for.
        lost: by a plan, all of `LOSSES`.
        loss, size: of a plan.

    Raises:
        ValueError: if what is allowed can't be had.
    """
    by_cost = any(name in allowed for name in COSTS)
    limits = {name: allowed[name] for name in LOSSES if name in allowed}
    if by_cost:
        found = [path.plan(_fewest(path, allowed, costs)) for path in paths]
    else:
        found = [path.plan(_most(path, limits, lost)) for path in paths]
    if by_cost and limits:
        losses = [lost(plan) for plan in found]
        good = [plan for plan, one in zip(found, losses, strict=True) if _is_allowed(one, limits)]
        if not good:
            nearest = min(losses, key=lambda one: max(one[name] - limits[name] for name in limits))
            over = next(name for name in limits if not _is_allowed(nearest, {name: limits[name]}))
            meeting = ", ".join(f"{cost} within {allowed[cost]:,.10g}" for cost in COSTS if cost in allowed)
            raise ValueError(
                f"{over} must be at least {nearest[over]:.4g}, with {meeting}: got {limits[over]:g}"
            )
        found = good
    return found[0] if len(found) == 1 else min(found, key=loss if by_cost else size)


def _is_allowed(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(found[name] <= limit + _NEAR for name, limit in limits.items())


def _fewest[P](path: Path[P], allowed: Mapping[str, float], costs: Callable[[P], Mapping[str, float]]) -> int:
    """The fewest steps after which all costs are allowed."""

    def over(steps: int) -> dict[str, float]:
        found = costs(path.plan(steps))
        return {name: cost for name, cost in found.items() if not cost <= allowed[name] * (1 + _NEAR)}

    for name, cost in over(path.steps).items():
        raise ValueError(
            f"{name} must be at least {cost:,.10g}, which is left at the floors of all layers: got "
            f"{allowed[name]:,.10g}"
        )
    low, high = 0, path.steps  # too few, enough
    if not over(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if over(middle) else (low, middle)
    while "milliseconds" in allowed and high < path.steps and over(high):  # times are not the same twice
        high += 1
    return high


def _most[P](path: Path[P], limits: Mapping[str, float], lost: Callable[[P], Mapping[str, float]]) -> int:
    """The most steps at which no more is lost than allowed, by bisection: losses rise along a path, but for noise."""
    low, high = 0, path.steps + 1  # few enough, too many
    while high - low > 1:
        middle = (low + high) // 2
        good = _is_allowed(lost(path.plan(middle)), limits)
        low, high = (middle, high) if good else (low, middle)
    return low


def by_score(
    table: pd.DataFrame,
    rule: Rule,
    binding: Binding,
    each: Mapping[str, float] | None,
    *,
    alike: bool = False,
) -> list[tuple[str, int]]:
    """In which order a budget takes structures by their scores: (layer, its row in the layer).

    The price of a structure is minus its score; in a layer that has lost some it rises, in proportion to what the layer
    had over what it has left: the last structure costs as much as the whole layer. What costs least for each unit that
    it frees goes first, and units are counted anew as layers thin out.

    Args:
        table, rule: of a plan.
        binding: of its network.
        each: by name of a parameter: what each of its entries counts. None: 1.
        alike: each structure counts as one unit, whatever it frees.
    """
    sizes = Sizes(binding.network, list(binding.groups.values()), each)
    layers = {}
    for layer, rows in table.groupby("layer", sort=False):
        score = torch.tensor(rows.score.to_numpy(), dtype=torch.float64)
        present = torch.tensor(rows.present.to_numpy())
        free = torch.isfinite(score) & present & ~torch.tensor(rows.removed_in_fit.to_numpy())
        order = [row for row in score.argsort(descending=True, stable=True).tolist() if free[row]]
        floor = max(rule.floor(len(rows)), 1)
        layers[str(layer)] = _Layer(score, order, present.cumsum(0) - 1, floor)
    found: list[tuple[str, int]] = []
    costs: dict[str, float] = {}
    changed = {*layers}
    while True:
        for site in changed & layers.keys():
            costs.pop(site, None)
            if layers[site].more:
                units = 1.0 if alike else layers[site].units(sizes.freed(site))
                costs[site] = layers[site].price() / units
        if not costs:
            return found
        site = min(costs, key=lambda name: costs[name])
        row = layers[site].take()
        found.append((site, row))
        changed = {site, *sizes.remove(site, int(layers[site].number[row]))}


@dataclass
class _Layer:
    """What is left of a layer.

    Attributes:
        score: of each row.
        order: rows, the next one first.
        number: of each row, which structure of the network it is.
        floor: how many stay.
    """

    score: torch.Tensor
    order: list[int]
    number: torch.Tensor
    floor: int

    def __post_init__(self) -> None:
        self.place = 0
        # what later rows cost together
        needed = (-self.score[self.order]).clamp(min=0)
        self.rest = needed.flip(0).cumsum(0).flip(0)

    @property
    def more(self) -> bool:
        return len(self.order) - self.place > self.floor

    def price(self) -> float:
        """Of the next structure."""
        own = -float(self.score[self.order[self.place]])
        rest = float(self.rest[self.place])
        return own * float(self.rest[0]) / rest if own > 0 and rest > 0 else own

    def units(self, freed: torch.Tensor) -> float:
        """What the next structure frees, of what each of the network's structures does."""
        each = freed.expand(int(self.number[-1]) + 1)
        return max(float(each[self.number[self.order[self.place]]]), 1.0)

    def take(self) -> int:
        row = self.order[self.place]
        self.place += 1
        return row
