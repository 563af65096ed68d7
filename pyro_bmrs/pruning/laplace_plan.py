"""The plan of a trained network: which structures its Laplace posterior is better without, along a path of removals."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check
from pyro_bmrs.evidence.kronecker import evidence_of_inputs, evidence_of_outputs
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.evaluate import Evaluation, evaluate
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.inference.likelihoods import Likelihood
from pyro_bmrs.networks.attention import join_attention, separate_attention
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.curvature import matrix_layers
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.hooked_noise import without_noise
from pyro_bmrs.networks.inputs import Inputs, batch_size, blamed_on_input, check_numbers, taken
from pyro_bmrs.networks.insertion import insert_noise
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.refit import examples_within
from pyro_bmrs.networks.refit import refit as refit_layers
from pyro_bmrs.networks.surgery import TOLERANCE
from pyro_bmrs.progress import Progress
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.budgets import Path
from pyro_bmrs.pruning.evidence_path import PATH_COLUMNS, evidence_path, reduced_model, take_over
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import COLUMNS
from pyro_bmrs.pruning.removal_path import (
    NoCurvatureError,
    RemovalOrder,
    Step,
    Touched,
    removal_path,
    touched,
)
from pyro_bmrs.pruning.rule import Rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A prediction of the rise of the loss that is off by more than this is told of.
_BELIEVED = 2.0
# Where it is off by more, and by more nats an example than this and so many standard errors, the evidence chooses no
# size.
_TOLERATED, _CHANCE = 0.02, 2.0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LaplacePlan(NetworkPlan):
    """Which structures of a trained network stay, by the evidence of its Laplace posterior.

    The score of a structure is minus its place on the path, so that `at(-n)` removes the first n. The plan of `reduce`
    stands where the total evidence is largest, of the sizes up to which the loss, as measured, rises by no more than
    twice what is predicted, 0.02 nats an example and two of its standard errors.

    Attributes:
        path: a row for each structure in the order of removal: layer, unit, outgoing and incoming (the parts of its ΔF
            alone, in nats: what it costs where it is read, and what its own weights cost), loss_rise (predicted, of the
            whole data set, nats), freed (parameters), parameters (left after it), total_loss_rise, measured_loss_rise
            (the same, on some examples of the fit), measured_loss_error (its standard error), total_evidence_change (ΔF
            of all so far, nats). The last three are NaN between the places where they were looked at.
        kept_back: by layer that the path can't touch: why.
        taken_apart: layers whose curvature is a product of channels and positions, since they are wide.
    """

    kind = "trained network"

    path: pd.DataFrame = field(default_factory=pd.DataFrame)
    kept_back: Mapping[str, str] = field(default_factory=dict)
    taken_apart: tuple[str, ...] = ()
    _guide: AutoKroneckerLaplace | None = field(default=None, metadata={"live": True})

    def apply(
        self,
        network: nn.Module | None = None,
        example_input: Inputs | None = None,
        *,
        refit: Data | None = None,
        progress: bool = True,
        tolerance: float = TOLERANCE,
    ) -> nn.Module:
        """The smaller network, with the weights of the reduced posterior.

        First the structures are cut out, and the smaller network is proved equal to the full one in which what reads
        them is 0. Then weights change: those that stay take over what they can of those that left, and biases what was
        constant of it.

        Args:
            network, example_input, tolerance: as in `NetworkPlan.apply`.
            refit: data (x, y), of which the inputs are used. Each layer is then fitted in closed form to what the full
                network has there, on the smaller network's own inputs, and BatchNorm gets new statistics.
            progress: show a bar of the refit, on a terminal.

        Raises:
            ValueError: as `NetworkPlan.apply`; also for a plan that was loaded, and lacks the posterior.
            EqualityError: as `NetworkPlan.apply`.
        """
        guide, cuts = self._guide, self.cuts
        if guide is None or cuts is None:
            raise ValueError(
                "plan must have its posterior: this one was loaded from disk. Give it with with_posterior(guide), or "
                "rebuild the network from its saved weights"
            )
        small = super().apply(network, example_input, tolerance=tolerance)
        separate_attention(small)
        take_over(small, guide, cuts)
        if refit is not None:
            full = without_noise(copied(self._bound(network, example_input).network)).eval()
            separate_attention(full)
            with Progress("refit", len(matrix_layers(small)), shown=progress) as bar:
                inputs = _inputs_of(refit, full, guide)
                refit_layers(small, full, cuts, inputs, memory=guide.room(), advance=bar.advance)
        join_attention(small)
        return small

    @property
    def steps(self) -> int:
        """How many structures of the path the plan removes."""
        threshold = self.rule.threshold
        return 0 if threshold is None else int(min(max(-threshold, 0), len(self.path)))

    def at(self, threshold: float) -> Self:
        check(isinstance(threshold, Real), "threshold", "a number", threshold)
        # structures that are not on the path stay, whose score is −∞
        return super().at(max(threshold, -float(len(self.table))))

    def plot(self) -> Figure:
        """Draw the evidence and the loss along the path: see `pyro_bmrs.figures.plot_removal_path`."""
        from pyro_bmrs.figures.removal_path import plot_removal_path

        return plot_removal_path(self.path, self.steps)

    def by_evidence(self) -> Self | None:
        """The plan where the evidence is largest, as far as losses rise as predicted; None for a loaded plan."""
        if self._guide is None:
            return None
        evidence = self.path.total_evidence_change[: _believed(self.path, self._guide.dataset_size)]
        best = int(evidence.argmax()) + 1 if evidence.max() > 0 else 0
        return self._by_threshold(-float(best) if best else math.inf)

    def with_posterior(self, guide: AutoKroneckerLaplace) -> Self:
        """This plan, with the posterior it was made from, and its network: what a plan that was loaded lacks.

        Raises:
            RuntimeError: if the guide has no posterior or no examples.
        """
        guide = of_a_copy(guide)
        return replace(self, _guide=guide, _binding=_binding(guide))

    def paths(self, asked: Collection[str], progress: bool) -> Iterator[Path[Self]]:
        by, _, own = self.rule.criterion.removeprefix("laplace_").partition("_per_")
        units = {"parameter": {"parameters", "bytes"}, "multiply_accumulate": {"macs", "milliseconds"}}
        wanted = [unit for unit, costs in units.items() if costs & {*asked}]
        yield self._path()
        for unit in wanted:
            if unit != own and self._guide is not None:
                order = RemovalOrder(by=by, per=unit)  # type: ignore[arg-type]
                other = reduce_by_laplace(
                    self._guide, order, min_kept=self.rule.min_kept, round_to=self.rule.round_to, progress=progress,
                )  # fmt: skip
                yield replace(self, rule=other.rule, table=other.table, path=other.path)._path()

    def _path(self) -> Path[Self]:
        """Its own path, to be gone as far as a budget says."""
        return Path(len(self.path), lambda count: self.at(-count if count else math.inf))

    def _examples(self) -> Data | None:
        return None if self._guide is None else self._guide.shown

    def evaluated(self, data: Data | Batches, model: nn.Module | None = None) -> Evaluation:
        return evaluate(self.reduced_model(), data)

    def reduced_model(self) -> Likelihood:
        """The model with the smaller network in it, without refit and proof.

        Raises:
            ValueError: for a plan that was loaded.
        """
        if self._guide is None:
            raise ValueError("plan must know its guide: this one was loaded from disk")
        return reduced_model(self.cuts, self._guide)

    def _details(self) -> list[str]:
        lines = super()._details()
        if self.steps:
            last = self.path.iloc[self.steps - 1]
            told = f"predicted rise of the loss: {last.total_loss_rise:.4g} nats over the data set"
            if last.total_evidence_change == last.total_evidence_change:
                told += f"; ΔF {last.total_evidence_change:+.4g} nats"
            lines.append(told)
            if self.rule.round_to is not None:
                lines.append("these are before widths are rounded")
        if self.taken_apart:
            lines.append(f"channels and positions taken apart: {', '.join(self.taken_apart)}")
        return lines

    def cautions(self) -> list[str]:
        lines = super().cautions()
        off = _largest_error(self.path.iloc[: self.steps])
        if off > _BELIEVED:
            lines.append(
                f"Up to here the loss rises by up to {off:.2g} times what is predicted, as measured before any refit; "
                "ΔF along the path is of what was measured."
            )
        lines += [f"Layer {layer} stays: {reason}." for layer, reason in self.kept_back.items()]
        return lines

    def _document(self) -> dict[str, Any]:
        records = self.path.astype(object).where(self.path.notna(), None).to_dict("records")
        own = {"path": records, "kept_back": dict(self.kept_back), "taken_apart": list(self.taken_apart)}
        return {**super()._document(), **own}

    @classmethod
    def _parts(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        path = pd.DataFrame(document["path"], columns=PATH_COLUMNS)
        numbers = path.columns.drop("layer")
        path[numbers] = path[numbers].astype(float)
        path = path.astype({"unit": int, "freed": int, "parameters": int})
        own = {
            "path": path,
            "kept_back": document["kept_back"],
            "taken_apart": tuple(document["taken_apart"]),
        }
        return {**super()._parts(document), **own}


def _inputs_of(data: Data, network: nn.Module, guide: AutoKroneckerLaplace) -> Inputs:
    """The inputs of some examples, in one batch on the network's device: as many as the guide's memory allows."""
    device = next(network.parameters()).device
    few, _ = Batches(data, 3, device, "refit").some(3, seed=0)
    with blamed_on_input(network, "refit"):
        wanted = min(guide.examples, examples_within(network, few, guide.room()))
    # in any order: data may be sorted by class
    x, _ = Batches(data, wanted, device, "refit").some(wanted, seed=0)
    check_numbers("refit", x)
    count = batch_size(x)
    return taken(x, slice(0, wanted), count) if count > wanted else x


@torch.no_grad()
def reduce_by_laplace(
    guide: AutoKroneckerLaplace,
    order: RemovalOrder = RemovalOrder(),  # noqa: B008 it is frozen
    *,
    min_kept: float = 1,
    round_to: int | None = None,
    progress: bool = True,
) -> LaplacePlan:
    """The plan of a trained network: see `pyro_bmrs.reduce`."""
    binding = _binding(guide)
    noisy, groups = binding.network, list(binding.groups.values())
    nesting = Nesting.of(groups)
    parts: dict[str, Touched] = {}
    kept_back: dict[str, str] = {}
    for group in groups:
        try:
            if group.site in nesting.owners:
                raise NoCurvatureError("inside of other structures")
            parts[group.site] = touched(noisy, group, guide.curvatures)
        except NoCurvatureError as error:
            kept_back[group.site] = str(error)
    rule = Rule(
        criterion=f"laplace_{order}",
        prior_log_odds=None,
        min_kept=min_kept,
        round_to=round_to,
        kl_weight=1.0,
    )
    floors = {group.site: rule.floor(group.features) for group in groups}
    alone = {group.site: _alone(guide, group, parts.get(group.site)) for group in groups}
    brought = {site: both[:, 1] for site, both in alone.items()}
    each = binding.multiply_accumulates_by_entry() if order.per == "multiply_accumulate" else None
    steps = removal_path(
        noisy, groups, parts, guide.curvatures, floors, order, guide.deltas, brought, each=each, progress=progress,
    )  # fmt: skip
    plan = LaplacePlan(
        table=_table(groups, steps, alone), rule=rule,
        channels={site: layer.channels for site, layer in noise_layers(noisy).items() if layer.channels > 1},
        nesting=nesting.spread({group.site: torch.ones(group.features, dtype=torch.bool) for group in groups}),
        kept_back=kept_back, _binding=binding, _guide=guide,
        taken_apart=tuple(path for path, one in guide.curvatures.items() if one.positions is not None),
    )  # fmt: skip
    path = evidence_path(plan, guide, steps, parts)
    rows = [alone[step.site][step.structure].tolist() for step in steps]
    path[["outgoing", "incoming"]] = np.array(rows).reshape(-1, 2)
    own = replace(plan, path=path).by_evidence()
    assert own is not None
    return own


def of_a_copy(guide: AutoKroneckerLaplace) -> AutoKroneckerLaplace:
    """The guide as it is now, of a copy of its model's parameters: whatever is trained later, a plan keeps to it."""
    own, model = copy.copy(guide), copy.copy(guide.model)
    model._modules = {**model._modules, "net": copied(model.net)}
    model._parameters = {
        name: one if one is None else nn.Parameter(one.detach().clone(), one.requires_grad)
        for name, one in model._parameters.items()
    }
    own._model = [model]
    return own


def _binding(guide: AutoKroneckerLaplace) -> Binding:
    """The network of a guide with noise, and what it is called with."""
    guide.check_ready()
    if guide.shown is None:
        raise RuntimeError(
            "guide must have examples to measure losses on: put some, (x, y), into guide.shown"
        )
    example, _ = guide.shown
    return Binding(insert_noise(guide.model.net, example), lambda: example)


def _believed(path: pd.DataFrame, examples: int) -> int:
    """Up to which step the loss rises as predicted, but for chance, so that the evidence can be believed."""
    chance = _CHANCE * path.measured_loss_error.fillna(0.0)
    off = path.measured_loss_rise - _BELIEVED * path.total_loss_rise - chance > _TOLERATED * examples
    return int(off.to_numpy().argmax()) if off.any() else len(path)


def _largest_error(path: pd.DataFrame) -> float:
    """The largest factor between the measured and the predicted rise of the loss, where it was measured.

    What is predicted counts as a nat over the data set at least: below that it is rounding.
    """
    known = path[path.measured_loss_rise.notna()]
    return (
        float((known.measured_loss_rise / known.total_loss_rise.clip(lower=1.0)).max()) if len(known) else 1.0
    )


def _table(
    groups: Sequence[StructureGroup], steps: Sequence[Step], alone: Mapping[str, Tensor]
) -> pd.DataFrame:
    """A row for each structure; its score is minus its place on the path."""
    place = {(step.site, step.structure): number for number, step in enumerate(steps, 1)}
    rows = [
        {
            "layer": group.site, "unit": unit, "loc": np.nan, "scale": np.nan, "mean": 1.0, "snr": np.nan,
            "score": -float(place.get((group.site, unit), np.inf)),
            "log_evidence_change": float(alone[group.site][unit].sum()), "kl_weight": 1.0, "removed": False,
            "removed_in_fit": False, "present": True,
        }
        for group in groups
        for unit in range(group.features)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _alone(guide: AutoKroneckerLaplace, group: StructureGroup, parts: Touched | None) -> Tensor:
    """ΔF of each structure alone: what it costs where it is read, and what its own weights cost. (structures, 2)."""
    found = torch.full((group.features, 2), torch.nan, dtype=torch.float64)
    if parts is None:
        return found
    found.zero_()
    for part in parts.reads:
        found[:, 0] += evidence_of_inputs(
            guide.curvatures[part.path], guide.deltas[part.path], part.places
        ).cpu()
    for part in parts.brings:
        each = evidence_of_outputs(guide.curvatures[part.path], guide.deltas[part.path]).flatten().cpu()
        found[:, 1] += each[part.places].sum(1)
    return found
