"""Plans within a budget: so small, with so little work, or losing so little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import pandas as pd
import torch
from torch import nn

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import Evaluation
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


def check_budget(budget: Mapping[str, float | None], data: Data | Batches | None) -> dict[str, float]:
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
        return self.of_network(self.binding.full_network()) if self.names else {}

    @cached_property
    def _separated(self) -> nn.Module:
        network = self.binding.full_network()
        separate_attention(network)
        return network

    def of_cuts(self, cuts: Cuts | None) -> dict[str, float]:
        """Of the original network after these cuts; parameters alone are counted without cutting."""
        if self.names == ["parameters"]:
            assert cuts is not None
            return {"parameters": cuts.parameters_left(self._separated)}
        return self.of_network(self.network(cuts))

    def network(self, cuts: Cuts | None) -> nn.Module:
        """The original network after these cuts, to look at its costs."""
        assert cuts is not None
        network = copied(self._separated)
        cuts.cut(network)
        join_attention(network)
        return network.eval()

    def of_network(self, network: nn.Module) -> dict[str, float]:
        """Of a network as it is."""
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


class Reduced(Protocol):
    """What a budget asks of a plan."""

    @property
    def cuts(self) -> Cuts | None: ...
    def parameters_left(self) -> int: ...
    def evaluated(self, data: Data | Batches) -> Evaluation: ...


class TooMuchLostError(ValueError):
    """No plan within the costs loses as little as is allowed.

    Attributes:
        nearest: what the one that exceeds it least evaluates to.
    """

    def __init__(self, message: str, nearest: Evaluation) -> None:
        super().__init__(message)
        self.nearest = nearest


class Budget:
    """What smaller networks of one network may cost and lose.

    Args:
        asked: by name, at most; costs below 1 are shares of the full network's. See `NetworkPlan.within`.
        data: to look at losses on; None: there is none.
        binding: of the network.
        batch: examples at once, where time counts.
        full: loss and accuracy that losses are counted from; called where losses are asked for.

    Raises:
        ValueError, TypeError: naming the argument.

    Attributes:
        allowed: by name, at most, as absolute numbers.
    """

    def __init__(
        self,
        asked: Mapping[str, float | None],
        data: Data | Batches | None,
        binding: Binding,
        batch: int,
        full: Callable[[], Evaluation],
    ) -> None:
        given = check_budget(asked, data)
        check(is_whole(batch, 1), "batch_size", "a positive integer", batch)
        self.data = data
        self._costs = Costs(binding, [name for name in COSTS if name in given], batch)
        whole = self._costs.of_full()
        self.allowed = {
            name: value * whole[name] if name in whole and value < 1 else value
            for name, value in given.items()
        }
        self._limits = {name: self.allowed[name] for name in LOSSES if name in given}
        if self._limits:
            self._full = full()
            if "accuracy_drop" in given and math.isnan(self._full.accuracy):
                raise ValueError("accuracy_drop must be left out for a model without classes: give loss_rise")

    @property
    def has_costs(self) -> bool:
        """Whether costs are asked for: then as little is removed as possible, else as much."""
        return bool(self._costs.names)

    @property
    def has_losses(self) -> bool:
        """Whether losses are asked for."""
        return bool(self._limits)

    def meets(self, plan: Reduced) -> bool:
        """Whether a plan costs no more than is allowed."""
        return not self._over(plan)

    def allows(self, found: Evaluation) -> bool:
        """Whether no more is lost than is allowed."""
        return _is_allowed(self._lost(found), self._limits)

    def too_much_lost(self, found: Sequence[Evaluation]) -> TooMuchLostError:
        """The error where plans meet the costs, but all lose more than is allowed: it names the nearest loss."""
        limits = self._limits
        nearest = min(found, key=lambda one: max(self._lost(one)[name] - limits[name] for name in limits))
        lost = self._lost(nearest)
        over = next(name for name in limits if not _is_allowed(lost, {name: limits[name]}))
        meeting = ", ".join(f"{cost} within {self.allowed[cost]:,.10g}" for cost in self._costs.names)
        return TooMuchLostError(
            f"{over} must be at least {lost[over]:.4g}, with {meeting}: got {limits[over]:g}", nearest
        )

    def better[P: Reduced](self, plans: Sequence[P], data: Data | Batches | None) -> P:
        """Of plans that meet the costs the one with the least loss; of those that lose no more the smallest.

        Args:
            data: to look at losses on; None: there is none, and the first is taken.
        """
        if len(plans) == 1 or (self.has_costs and data is None):
            return plans[0]
        if not self.has_costs:
            return min(plans, key=lambda plan: plan.parameters_left())
        assert data is not None
        return min(plans, key=lambda plan: plan.evaluated(data).loss)

    def nearest[P: Reduced](self, paths: Iterable[Path[P]], seen: Data | Batches | None) -> P:
        """The plan of several paths that meets it.

        Args:
            paths: one for each order that is to be tried.
            seen: examples to compare orders on where no data are given.

        Raises:
            ValueError: if what is allowed can't be had.
        """
        steps = self._fewest if self.has_costs else self._most
        found = [path.plan(steps(path)) for path in paths]
        if self.has_costs and self._limits:
            found = self._losing_little(found)
        return self.better(found, seen if self.data is None else self.data)

    def _lost(self, found: Evaluation) -> dict[str, float]:
        return {
            "accuracy_drop": 100 * (self._full.accuracy - found.accuracy),
            "loss_rise": found.loss - self._full.loss,
        }

    def _over(self, plan: Reduced) -> dict[str, float]:
        """The costs that are more than is allowed."""
        found = self._costs.of_cuts(plan.cuts)
        return {name: cost for name, cost in found.items() if not cost <= self.allowed[name] * (1 + _NEAR)}

    def _losing_little[P: Reduced](self, found: Sequence[P]) -> list[P]:
        """Those of plans that lose no more than is allowed. Raises ValueError if there are none."""
        assert self.data is not None
        losses = [plan.evaluated(self.data) for plan in found]
        good = [plan for plan, one in zip(found, losses, strict=True) if self.allows(one)]
        if not good:
            raise self.too_much_lost(losses)
        return good

    def _fewest[P: Reduced](self, path: Path[P]) -> int:
        """The fewest steps after which all costs are allowed."""
        for name, cost in self._over(path.plan(path.steps)).items():
            raise ValueError(
                f"{name} must be at least {cost:,.10g}, which is left at the floors of all layers: got "
                f"{self.allowed[name]:,.10g}"
            )
        found = first(path.steps, lambda steps: not self._over(path.plan(steps)))
        while "milliseconds" in self.allowed and found < path.steps and self._over(path.plan(found)):
            found += 1  # times are not the same twice
        return found

    def _most[P: Reduced](self, path: Path[P]) -> int:
        """The most steps at which no more is lost than allowed: losses rise along a path, but for noise."""
        data = self.data
        assert data is not None
        return (
            first(
                path.steps + 1,
                lambda steps: steps > 0 and not self.allows(path.plan(steps).evaluated(data)),
            )
            - 1
        )


def first(last: int, good: Callable[[int], bool]) -> int:
    """The first number from 0 on that is good, by bisection; `last` is known to be, or stands for none."""
    low, high = -1, last  # not good, good
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _is_allowed(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(found[name] <= limit + _NEAR for name, limit in limits.items())


def one_standard_error(losses: Sequence[float], errors: Sequence[float], sizes: Sequence[float]) -> int:
    """Which network of a path is the smallest whose loss is within one standard error of the least.

    The rule of Breiman and others (1984): a smaller difference may be one of the examples that were looked at. The
    least loss is that of medians over three neighbours, which differ little: no lucky one decides.

    Args:
        losses, errors: of each, with its standard error; NaN counts as 0.
        sizes: of each.
    """
    last = len(losses) - 1
    typical = [
        sorted((losses[max(place - 1, 0)], loss, losses[min(place + 1, last)]))[1]
        for place, loss in enumerate(losses)
    ]
    best = min(range(len(losses)), key=lambda place: typical[place])
    allowed = typical[best] + (0.0 if math.isnan(errors[best]) else errors[best])
    good = [place for place, loss in enumerate(losses) if max(loss, typical[place]) <= allowed]
    # of two or fewer the median may be the worse
    good = good or [min(range(len(losses)), key=lambda place: losses[place])]
    return min(good, key=lambda place: (sizes[place], losses[place]))


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
