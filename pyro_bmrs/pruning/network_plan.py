"""The plan of a network: which structures stay, and the smaller network that follows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Self

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.networks.attention import separate_attention
from pyro_bmrs.networks.copies import copied, uncompiled
from pyro_bmrs.networks.cost import compare_costs
from pyro_bmrs.networks.cuts import Cuts
from pyro_bmrs.networks.examples import at_most
from pyro_bmrs.networks.export import load_weights
from pyro_bmrs.networks.hooked_noise import without_noise
from pyro_bmrs.networks.inputs import Inputs, check_finite, check_module, tensors_of
from pyro_bmrs.networks.inputs import batch_size as examples_in
from pyro_bmrs.networks.matrices import kind_of
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.surgery import TOLERANCE, remove_structures
from pyro_bmrs.pruning.binding import Binding, check_examples
from pyro_bmrs.pruning.budgets import Budget, Path, by_score
from pyro_bmrs.pruning.decision import Candidates, removals
from pyro_bmrs.pruning.plan import Plan
from pyro_bmrs.pruning.shrink import earlier_cuts, original_network, shrink

# A fit starts at log θ = 0. If no posterior is below this, it has had too little time.
LITTLE_TRAVEL = -3.0
_FLOOR_ADVICE = (
    "one structure is left of a layer, which costs accuracy: give reduce a floor, such as min_kept=0.125"
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NetworkPlan(Plan):
    """Which structures of a network stay, which are removed, and why.

    A plan from `reduce` knows its network, and `apply` needs no argument. A plan that was loaded or unpickled does not:
    call `apply(network, example_input)`.

    Attributes:
        nesting: which structures lie inside others (`InputSelection`), in the order of the table.
        channels: by layer, channels that one structure has where it is made, if more than 1.
    """

    kind = "network"

    nesting: Nesting = field(default_factory=Nesting)
    channels: Mapping[str, int] = field(default_factory=dict)
    _cuts: Cuts | None = None
    _kinds: Mapping[str, str] = field(default_factory=dict)
    _binding: Binding | None = field(default=None, metadata={"live": True})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cuts": self.cuts, "_kinds": self.kinds()}

    # decisions --------------------------------------------------------------------------------------

    def theta_mean(self) -> dict[str, Tensor]:
        """E[θ] of each kept structure and 0 of each removed one in the network, by layer, float64."""
        rows = self.table.assign(mean=self.table["mean"].where(~self.table.removed, 0.0))[self.table.present]
        return {layer: torch.tensor(rows["mean"][rows.layer == layer].to_numpy()) for layer in self.layers}

    def at(self, threshold: float) -> Self:
        rule = self.rule.at(threshold)
        return replace(self.deciding(self.candidates(threshold)), rule=rule)

    def deciding(self, layers: Mapping[str, Candidates]) -> Self:
        """The plan that these candidates lead to; all layers, in the order of the table."""
        removed = torch.cat([*removals(layers, self.nesting).values()]).numpy()
        return replace(self, table=self.table.assign(removed=removed), _cuts=None)

    def candidates(self, threshold: float) -> dict[str, Candidates]:
        """The candidates of each layer: structures with score ≥ threshold, and those removed before."""
        layers = {}
        for layer, rows in self.table.groupby("layer", sort=False):
            score = torch.tensor(rows.score.to_numpy())
            before = torch.tensor(rows.removed_in_fit.to_numpy())
            multiple = self.rule.multiple(self.channels.get(str(layer), 1))
            wanted = (score >= threshold) | before
            layers[str(layer)] = Candidates(wanted, score, ~before, self.rule.floor(len(rows)), multiple)
        return layers

    def within(
        self,
        data: Data | None = None,
        *,
        parameters: float | None = None,
        macs: float | None = None,
        bytes: float | None = None,
        milliseconds: float | None = None,
        accuracy_drop: float | None = None,
        loss_rise: float | None = None,
        batch_size: int = 1,
        progress: bool = True,
    ) -> Self:
        """The plan that meets a budget: of costs by removing as little as possible, else by removing as much.

        >>> plan.within(parameters=0.2, macs=0.5)  # doctest: +SKIP
        >>> plan.within(validation, accuracy_drop=0.5)  # doctest: +SKIP

        What costs least by its score goes first: for each parameter that it frees, for each structure, or, where work
        or time is asked for, for each multiply-accumulate. A `LaplacePlan` goes by the predicted rise of the loss, in
        its own order or for each unit of what is asked for. Of these orders the one is taken that leads to the least
        loss: on the data given, else on the examples that the guide saw first. Prices rise as a layer thins out, so
        that none collapses; parameters are counted anew as others leave. Structures with a score of 0 or more stay too
        if the budget allows.

        Args:
            data: (x, y) that were not used for the fit, to look at losses on; as for `evaluate`.
            parameters: of the smaller network, at most.
            macs: multiply-accumulates of one example, at most.
            bytes: of its file of weights (safetensors), at most.
            milliseconds: of one forward pass of `batch_size` examples, at most: the median, on this machine, with
                torch's current threads. Costs below 1 are shares of the original network's.
            accuracy_drop: in points of accuracy (percent) at most, of the reduced model before any training; 0.5 leaves
                97.5 of 98 %.
            loss_rise: of −log p(y | x), in nats an example at most.
            progress: show a bar of what takes long, on a terminal.

        Returns:
            A plan whose `rule` has the budget. Of costs it is the nearest below on the path; `round_to` and `min_kept`
            hold. Losses are looked at by bisection, so that a larger plan further on may lose as little.

        Raises:
            ValueError: naming a budget that can't be met, with the nearest one that can; or a bad number.
            TypeError: for losses without data.
        """
        asked = {
            "parameters": parameters, "macs": macs, "bytes": bytes, "milliseconds": milliseconds,
            "accuracy_drop": accuracy_drop, "loss_rise": loss_rise,
        }  # fmt: skip
        return self.meeting(self.budget(asked, data, batch_size), progress=progress)

    def meeting(self, budget: Budget, *, progress: bool = True) -> Self:
        """As `within`."""
        return budget.nearest(self.paths(budget.allowed.keys(), progress), self._examples()).told(budget)

    def told(self, budget: Budget) -> Self:
        """This plan, whose rule names what was asked."""
        allowed = {name: round(value, 10) for name, value in budget.allowed.items()}
        return replace(self, rule=replace(self.rule, budget=allowed))

    def budget(
        self,
        asked: Mapping[str, float | None],
        data: Data | Batches | None,
        batch_size: int = 1,
        before: Evaluation | None = None,
    ) -> Budget:
        """What `within` is asked for. Losses are counted from `before`, by default from this plan's network in full."""
        full = self.at_least()
        self._check_layers(full._bound().network)

        def whole() -> Evaluation:
            assert data is not None
            return full.evaluated(data) if before is None else before

        return Budget(asked, data, full._bound(), batch_size, whole)

    def at_least(self) -> Self:
        """The plan that removes nothing but what the fit has removed."""
        return self._by_threshold(math.inf)

    def by_evidence(self) -> Self | None:
        """The plan that the evidence alone decides; None where it can't be told."""
        return self._by_threshold(0.0) if self.rule.has_evidence else None

    def _by_threshold(self, threshold: float) -> Self:
        """As `at`, also of a plan that a search or a budget has decided."""
        return replace(self, rule=replace(self.rule, threshold=0.0, budget={})).at(threshold)

    def paths(self, asked: Collection[str], progress: bool) -> Iterator[Path[Self]]:
        """The orders in which a budget of these costs and losses may take structures.

        Of a posterior that had time to settle, scores for what is freed say most. Else they are much alike, and would
        have layers go whose structures are large.
        """
        full, binding = self.at_least(), self._bound()
        orders = [by_score(self.table, self.rule, binding, None, alike=alike) for alike in (False, True)]
        if {"macs", "milliseconds"} & {*asked}:
            each = binding.multiply_accumulates_by_entry()
            orders.append(by_score(self.table, self.rule, binding, each))
        for steps in orders:
            yield Path(len(steps), partial(full._without, steps))

    def _without(self, steps: Sequence[tuple[str, int]], count: int) -> Self:
        layers = self.candidates(math.inf)
        for layer, row in steps[:count]:
            layers[layer].removed[row] = True
        return replace(self.deciding(layers), rule=replace(self.rule, threshold=None))

    def _examples(self) -> Data | None:
        """Some examples (x, y) that the plan knows; None: it knows none, and the first order is taken."""
        binding = self._bound()
        if binding.model is None or len(binding.arguments) != 2:
            return None
        x, y = binding.arguments
        paired = isinstance(y, Tensor) and bool(tensors_of(x)) and examples_in(x) == len(y)
        return (x, y) if paired else None

    def evaluated(self, data: Data | Batches, model: nn.Module | None = None) -> Evaluation:
        """Loss and accuracy of the reduced model.

        Args:
            data: as for `evaluate`.
            model: the Pyro model that was reduced; default the one that the plan knows.

        Raises:
            ValueError: for a plan that was loaded, or made of a network alone, without a model.
        """
        own = self._binding
        if own is not None and own.model is not None and (model is None or own.belongs_to(model)):
            model = own.model  # as it was
        if model is None:
            raise ValueError("plan must know its model: this one was loaded from disk")
        device = next(model.parameters()).device
        values = {**(self._binding.others if self._binding is not None else {}), **self.theta_mean()}
        return evaluate(model, data, {site: value.to(device).float() for site, value in values.items()})

    # a smaller network ------------------------------------------------------------------------------

    def bound_to(
        self, network: nn.Module, find_input: Callable[[], Inputs], model: nn.Module | None = None
    ) -> Self:
        """This plan, with a network to apply it to, a function that makes an example input, and its Pyro model."""
        return replace(self, _binding=Binding(network, find_input, model, known=self._binding))

    def settled(self) -> Self:
        """This plan, with a copy of its network and model, which later fits do not change."""
        return self if self._binding is None else replace(self, _binding=self._binding.of_a_copy())

    def kinds(self) -> dict[str, str]:
        """By layer what makes its structures, such as "Conv2d 5×5"."""
        if self._binding is None:
            return dict(self._kinds)
        network = self._binding.network
        makers = {site: next(iter(group.producers), None) for site, group in self._binding.groups.items()}
        return {
            site: kind_of(network.get_submodule(one.path)) for site, one in makers.items() if one is not None
        }

    def _bound(self, network: nn.Module | None = None, example_input: Inputs | None = None) -> Binding:
        """What is given, else what the plan is bound to. Raises ValueError if something is missing."""
        own = self._binding
        if network is None:
            if own is None:
                raise ValueError("network must be given: this plan was loaded from disk and holds none")
            network = own.network
        network = uncompiled(network)
        if example_input is None:
            if own is None:
                raise ValueError("example_input must be given: a batch of inputs of the network")
            if network is own.network:
                return own
            return Binding(network, lambda: own.example_input, known=own)
        return Binding(network, lambda: example_input)

    @property
    def cuts(self) -> Cuts | None:
        """The entries that `apply` keeps of each tensor, which `rebuild` needs; None without a network."""
        if self._cuts is not None or self._binding is None or not self._binding.has_input:
            return self._cuts
        network = self._binding.network
        if self._planned() != _features(network):  # it has shrunk since
            return None
        return earlier_cuts(network).then(self._binding.cuts(self.kept_masks()))

    def apply(
        self,
        network: nn.Module | None = None,
        example_input: Inputs | None = None,
        *,
        tolerance: float = TOLERANCE,
    ) -> nn.Module:
        """The smaller network: a plain module with E[θ] folded into its weights, proved equal to the reduced model.

        Args:
            network: the network with noise layers; default the one that was reduced, as it was then.
            example_input: a batch of inputs: a tensor, a tuple of arguments, or a mapping of keyword
                arguments; default what the guide was first called with.
            tolerance: allowed difference in float64, of the outputs and of every layer that reads
                structures, relative to their spread over at most 32 examples of the batch.

        Returns:
            The network, in evaluation mode.

        Raises:
            ValueError: if network or example input are missing, or do not match the plan.
            EqualityError: if the smaller network does not compute what the reduced model computes; the
                message has the largest difference.
        """
        check(is_number(tolerance) and tolerance > 0, "tolerance", "a positive number", tolerance)
        binding = self._bound(network, example_input)
        self._check_layers(binding.network)
        check(examples_in(binding.example_input) > 0, "example_input", "one example or more", 0)
        collapsed = self._collapsed()
        if collapsed:
            warnings.warn(f"{', '.join(collapsed)}: {_FLOOR_ADVICE}", stacklevel=2)
        inputs = binding.example_input
        surgery = remove_structures(
            binding.network, self.kept_masks(), self.theta_mean(),
            at_most(binding.network, inputs, check_examples(binding.network, inputs)),
            groups=binding.groups, tolerance=tolerance,
        )  # fmt: skip
        return surgery.network.eval()

    def costs(
        self,
        small: nn.Module,
        network: nn.Module | None = None,
        example_input: Inputs | None = None,
        *,
        seconds: float = 4.0,
    ) -> pd.DataFrame:
        """What `small` costs beside the full network: see `compare_costs`.

        Args:
            small: what `apply` gave.
            network, example_input: as in `apply`.
            seconds: for all timings together; timings that would take longer are NaN. 0 for none.

        Returns:
            Rows parameters, multiply_accumulates (of one example), file_bytes, peak_bytes…, milliseconds…; columns
            before, after and error, of after/before.

        Raises:
            TypeError: if `small` is no network.
        """
        check_module("small", small)
        binding = self._bound(network, example_input)
        return compare_costs(binding.full_network(), small, binding.example_input, seconds=seconds)

    def _planned(self) -> dict[str, int]:
        return {layer: len(self._present(layer)) for layer in self.layers}

    def _check_layers(self, network: nn.Module) -> None:
        """Raise ValueError for a network that is not the one that was reduced."""
        planned, found = self._planned(), _features(network)
        if found != planned:
            raise ValueError(f"network must have the noise layers of the plan, {planned}: got {found}")

    def parameters_left(self, network: nn.Module | None = None, example_input: Inputs | None = None) -> int:
        """Number of parameters that `apply` would leave, counted without cutting."""
        return self._bound(network, example_input).parameters_left(self.kept_masks())

    def parameters_at(self, thresholds: Sequence[float]) -> list[int]:
        """Number of parameters that the plans `at` these thresholds would leave, counted without cutting."""
        return self.parameters_of([self.at(threshold) for threshold in thresholds])

    def parameters_of(self, plans: Sequence[NetworkPlan]) -> list[int]:
        """Number of parameters that other plans for this one's network would leave, counted without cutting."""
        binding = self._bound()
        return [binding.parameters_left(plan.kept_masks()) for plan in plans]

    def parameters_before(self, network: nn.Module | None = None) -> int:
        """Number of parameters of the original network, before a fit removed any."""
        network = network if network is not None else self._bound().network
        return sum(parameter.numel() for parameter in original_network(network).parameters())

    def rebuild(self, network: nn.Module, weights: FilePath | str | None = None) -> nn.Module:
        """The smaller network, made from a fresh one of the original class: no data, no posterior, no pickle.

        >>> plan = NetworkPlan.load("plan.json")  # doctest: +SKIP
        >>> small = plan.rebuild(resnet18(), "small.safetensors")  # doctest: +SKIP

        Args:
            network: made as the original was, with noise or without; not changed.
            weights: a safetensors file of the smaller network's weights. None: those of `network`, without E[θ].

        Returns:
            The network in evaluation mode.

        Raises:
            ValueError: if the plan has no cuts, or network or weights don't belong to it.
        """
        cuts = self.cuts
        if cuts is None:
            raise ValueError(
                "plan must say what to cut: this one was made without a network, or that has shrunk since"
            )
        small = copied(network)
        separate_attention(small)
        cuts.cut(small)
        small = without_noise(small)
        if weights is not None:
            try:
                small.load_state_dict(load_weights(weights))
            except (OSError, SafetensorError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"weights {weights} are damaged, or not of this plan: {reason}") from error
            check_finite(f"weights {weights}", small)
        return small.eval()

    def shrink(
        self,
        model: nn.Module,
        guide: AutoTruncatedLogNormal,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Take the removed structures out of model, guide and optimizer, in place, and go on fitting.

        The noise stays, and nothing is folded into weights. Parameters are the same objects with fewer entries; so is
        the optimizer's state of each. Tables of later plans number structures as in the original network.

        Args:
            model: the Pyro model that was reduced.
            guide: its guide.
            optimizer: of your own loop (`fit` makes a new one). Its state must have the shapes of the parameters, as
                that of Adam and SGD has.

        Raises:
            ValueError, TypeError: if model, guide or optimizer don't match the plan; nothing is changed then.
            EqualityError: if the smaller model would not compute the same; nothing is changed then.
        """
        shrink(model, guide, self.kept_masks(), optimizer, self._bound().example_input)

    # words and files --------------------------------------------------------------------------------

    def _details(self) -> list[str]:
        lines = []
        known = self._binding is not None and self._binding.has_groups
        if known and self.cuts is not None:
            before, after = self.parameters_before(), self.parameters_left()
            share = 100 * (1 - after / before)
            lines.append(f"parameters: {before:,} → {after:,} ({share:.1f} % less)")
        if self.rule.round_to is not None:
            lines.append(f"channels rounded up to multiples of {self.rule.round_to}, by score")
        widths = self.widths()
        if not self.table.removed.any():
            advice = _advice(float(self.table["loc"].min())) if self.rule.has_evidence else ""
            lines.append(f"nothing to remove{advice}")
        floors = widths.before.map(self.rule.floor)
        held = widths.layer[(widths.after <= floors) & (widths.before > floors)]
        if len(held):
            lines.append(f"at the floor of {self.rule.floor_text} kept: {', '.join(map(str, held))}")
        if self._collapsed():
            lines.append(_FLOOR_ADVICE)
        return lines

    def _collapsed(self) -> list[str]:
        """Layers of which a threshold below 0 leaves a single structure, since no larger floor was given."""
        if self.rule.threshold is None or self.rule.threshold >= 0 or self.rule.min_kept != 1:
            return []
        widths = self.widths()
        return [*map(str, widths.layer[(widths.after == 1) & (widths.before > 1)])]

    def _document(self) -> dict[str, Any]:
        cuts = self.cuts
        return {
            "channels": dict(self.channels),
            "nesting": self.nesting.to_json(),
            "cuts": None if cuts is None else cuts.to_json(),
            "kinds": self.kinds(),
        }

    @classmethod
    def _parts(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        channels = document["channels"]
        if not all(is_whole(count, 1) for count in channels.values()):
            raise ValueError(f"its channels can't be {channels!r}"[:200])
        return {
            "channels": channels,
            "nesting": Nesting.from_json(document["nesting"], document["layers"]),
            "_cuts": None if document["cuts"] is None else Cuts.from_json(document["cuts"]),
            "_kinds": {str(layer): str(kind) for layer, kind in document["kinds"].items()},
        }


def _features(network: nn.Module) -> dict[str, int]:
    return {site: layer.features for site, layer in noise_layers(network).items()}


def _advice(lowest: float) -> str:
    """Advice where nothing is removed: the fit was too short, or the data need each structure."""
    told = f": the lowest log θ is {lowest:.1f}"
    if lowest > LITTLE_TRAVEL:
        return (
            f"{told}, hardly below 0 where it began. A step moves it by at most posterior_learning_rate: give more "
            "epochs, smaller batches or a higher rate"
        )
    return f"{told}, and the data need each structure at this KL weight: raise it, such as to three times as much"
