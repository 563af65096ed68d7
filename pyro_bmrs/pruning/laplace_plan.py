"""The plan of a trained network: which structures its Laplace posterior is better without, along a path of removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.evidence.kronecker import evidence_of_inputs, evidence_of_outputs
from pyro_bmrs.inference.batches import Batches, Data
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.networks.attention import join_attention, separate_attention
from pyro_bmrs.networks.copies import copied
from pyro_bmrs.networks.groups import StructureGroup
from pyro_bmrs.networks.inputs import Inputs, batch_size, map_tensors, taken
from pyro_bmrs.networks.insertion import insert_noise
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.networks.refit import refit as refit_layers
from pyro_bmrs.networks.surgery import TOLERANCE
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.evidence_path import PATH_COLUMNS, evidence_path, take_over
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import COLUMNS
from pyro_bmrs.pruning.removal_path import (
    NoCurvatureError,
    Step,
    Touched,
    removal_path,
    touched,
)
from pyro_bmrs.pruning.rule import Rule

# Of the data that a refit is given, so many examples are used.
REFIT_EXAMPLES = 4000


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LaplacePlan(NetworkPlan):
    """Which structures of a trained network stay, by the evidence of its Laplace posterior.

    The score of a structure is minus its place on the path, so that `at(-n)` removes the first n. The plan of `reduce`
    stands where the total evidence is largest.

    Attributes:
        path: a row for each structure in the order of removal: layer, unit, loss_rise (predicted, of the whole data
            set, nats), parameters (left after it), total_loss_rise, measured_loss_rise (the same, on some examples of
            the fit), total_evidence_change (ΔF of all so far, nats). NaN between the places where it was looked at.
        alone: by layer, the two parts of ΔF of each structure alone, (structures, 2): outgoing and incoming.
        kept_back: by layer that the path can't touch: why.
    """

    kind = "laplace"

    path: pd.DataFrame = field(default_factory=pd.DataFrame)
    alone: Mapping[str, Tensor] = field(default_factory=dict)
    kept_back: Mapping[str, str] = field(default_factory=dict)
    _guide: AutoKroneckerLaplace | None = field(default=None, metadata={"live": True})

    def apply(
        self,
        network: nn.Module | None = None,
        example_input: Inputs | None = None,
        *,
        refit: Data | None = None,
        tolerance: float = TOLERANCE,
    ) -> nn.Module:
        """The smaller network, with the weights of the reduced posterior.

        First the structures are cut out, and the smaller network is proved equal to the full one in which what reads
        them is 0. Then weights change: those that stay take over what they can of those that left.

        Args:
            network, example_input, tolerance: as in `NetworkPlan.apply`.
            refit: data (x, y), of which the inputs are used. Each layer is then fitted in closed form to what the full
                network has there, on the smaller network's own inputs, and BatchNorm gets new statistics.

        Raises:
            As `NetworkPlan.apply`. Also ValueError, for `refit` of a plan that was loaded.
        """
        small = super().apply(network, example_input, tolerance=tolerance)
        guide, cuts = self._guide, self.cuts
        if guide is None or cuts is None:
            if refit is not None:
                raise ValueError("refit needs the full network: this plan was loaded from disk")
            return small
        separate_attention(small)
        take_over(small, guide, cuts)
        if refit is not None:
            full = copied(guide.model.net).eval()
            refit_layers(small, full, cuts, _inputs_of(refit, small))
        join_attention(small)
        return small

    def _details(self) -> list[str]:
        lines = super()._details()
        if len(self.path) and self.rule.threshold is not None:
            steps = min(max(int(-self.rule.threshold), 0), len(self.path))
            if steps:
                last = self.path.iloc[steps - 1]
                told = f"predicted rise of the loss: {last.total_loss_rise:.4g} nats over the data set"
                if last.total_evidence_change == last.total_evidence_change:
                    told += f"; ΔF {last.total_evidence_change:+.4g} nats"
                lines.append(told)
        lines += [f"{layer} stays: {reason}" for layer, reason in self.kept_back.items()]
        return lines

    def _document(self) -> dict[str, Any]:
        records = self.path.replace({np.nan: None}).to_dict("records")
        alone = {layer: parts.tolist() for layer, parts in self.alone.items()}
        return {**super()._document(), "path": records, "alone": alone, "kept_back": dict(self.kept_back)}

    @classmethod
    def _parts(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        path = pd.DataFrame(document["path"], columns=PATH_COLUMNS)
        numbers = path.columns.drop("layer")
        path[numbers] = path[numbers].astype(float)
        alone = {
            layer: torch.tensor(parts, dtype=torch.float64) for layer, parts in document["alone"].items()
        }
        return {**super()._parts(document), "path": path, "alone": alone, "kept_back": document["kept_back"]}


def _inputs_of(data: Data, network: nn.Module) -> Inputs:
    """The inputs of some examples, in one batch on the network's device."""
    device = next(network.parameters()).device
    batches = Batches(data, REFIT_EXAMPLES, device, "refit")
    x, _ = batches.first()
    size = batch_size(x)
    return taken(x, slice(0, REFIT_EXAMPLES), size) if size > REFIT_EXAMPLES else map_tensors(lambda t: t, x)


@torch.no_grad()
def reduce_by_laplace(
    guide: AutoKroneckerLaplace, *, min_kept: float = 1, round_to: int | None = None
) -> LaplacePlan:
    """The plan of a trained network: see `pyro_bmrs.reduce`."""
    guide._check_ready()
    assert guide.shown is not None
    example, labels = guide.shown
    noisy = insert_noise(guide.model.net, example)
    binding = Binding(noisy, lambda: example)
    groups = list(binding.groups.values())
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
        criterion="KroneckerLaplace", prior_log_odds=None, min_kept=min_kept, round_to=round_to, kl_weight=1.0
    )
    floors = {group.site: rule.floor(group.features) for group in groups}
    steps = removal_path(noisy, groups, parts, guide.curvatures, floors)
    alone = {group.site: _alone(guide, group, parts.get(group.site)) for group in groups}
    plan = LaplacePlan(
        table=_table(groups, steps, alone), rule=rule,
        channels={site: layer.channels for site, layer in noise_layers(noisy).items() if layer.channels > 1},
        nesting=nesting.spread({group.site: torch.ones(group.features, dtype=torch.bool) for group in groups}),
        alone=alone, kept_back=kept_back, _binding=binding, _guide=guide,
    )  # fmt: skip
    plan = replace(plan, path=evidence_path(plan, guide, steps, parts, (example, labels)))
    evidence = plan.path.total_evidence_change.to_numpy()
    best = int(np.nanargmax(evidence)) + 1 if len(evidence) and np.nanmax(evidence) > 0 else 0
    return plan.at(-float(best) if best else float("inf"))


def _table(
    groups: Sequence[StructureGroup], steps: Sequence[Step], alone: Mapping[str, Tensor]
) -> pd.DataFrame:
    """A row for each structure; its score is minus its place on the path."""
    place = {(step.site, step.structure): number for number, step in enumerate(steps, 1)}
    rows = [
        {
            "layer": group.site, "unit": unit, "loc": 0.0, "scale": 0.0, "mean": 1.0, "snr": np.nan,
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
