"""The plan of a Pyro program: which elements of its latents get their reduced priors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import pandas as pd
import torch
from torch import Tensor

from pyro_bmrs.pruning.decision import Candidates
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import Plan

if TYPE_CHECKING:
    from pyro_bmrs.programs.latents import Evidence, Latents
    from pyro_bmrs.programs.reduced_posterior import ReducedPosterior


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _ByReducedPriors(Plan):
    """What plans by reduced priors have beside the table.

    Attributes:
        sites: ΔF of reducing all of a site at once: columns site, elements, log_evidence_change, standard_error
            (nats; 0: closed form), khat (NaN: closed form).
        groups: the same for the groups that were named: column group instead of site.
        steps: of `greedy_reduction`, what was reduced in which order; not saved.
        checked: ΔF of what `reduce` has checked by the model itself: columns name, log_evidence_change (by the guide),
            checked, standard_error, khat; None where the model can't be asked. Not saved.
    """

    sites: pd.DataFrame
    groups: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    checked: pd.DataFrame | None = None
    _latents: Latents | None = field(default=None, metadata={"live": True})

    def joint_evidence(self) -> Evidence:
        """ΔF in nats of reducing at once all that is removed by its own evidence, with standard error and k̂.

        Structures that are removed only because others around them are (`InputSelection`) are not counted. In a joint
        normal posterior this is not the sum of the single elements' ΔF.

        Raises:
            ValueError: for a plan that was loaded or unpickled, which knows no reduced priors.
        """
        latents = self._known()
        return latents.change(self._chosen(latents))

    def reduced_posterior(self) -> ReducedPosterior:
        """The posterior of the reduced model, as a guide. It predicts without a new fit.

        >>> predictive = pyro.infer.Predictive(model, guide=plan.reduced_posterior(), num_samples=100)  # doctest: +SKIP

        Raises:
            ValueError: as `joint_evidence`.
        """
        latents = self._known()
        return latents.reduced_posterior(self._chosen(latents))

    def _known(self) -> Latents:
        if self._latents is None:
            raise ValueError(
                "plan must be one that reduce(model, guide, {site: reduced_prior, …}) has just made, to have a "
                "reduced posterior: one that was loaded or unpickled knows no reduced priors"
            )
        return self._latents

    def _chosen(self, latents: Latents) -> dict[str, Tensor]:
        return {
            name: (~self.kept_mask(name) & self._asked_of(name)).reshape(site.shape)
            for name, site in latents.sites.items()
        }

    def _asked_of(self, name: str) -> Tensor:
        """True where an element is reduced by its own evidence. Shape: (elements,)."""
        return torch.ones(len(self._present(name)), dtype=torch.bool)

    def _details(self) -> list[str]:
        lines = [*super()._details(), *_evidence_lines(self.sites, "site")]
        return lines if self.groups is None else [*lines, *_evidence_lines(self.groups, "group")]

    def _document(self) -> dict[str, Any]:
        return {**super()._document(), "sites": _records(self.sites), "groups": _records(self.groups)}

    @classmethod
    def _parts(cls, document: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **super()._parts(document),
            "sites": _frame(document["sites"]),
            "groups": _frame(document["groups"]),
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ProgramPlan(_ByReducedPriors):
    """Which elements of a Pyro program's latents are better off with their reduced priors.

    The table has a row for each element of a site (layer: the site's name, unit: the element's number, the last
    dimension running fastest), its loc and scale where the posterior has them (of the unconstrained value where it is a
    transformed normal), and the columns standard_error and khat. Removed means reduced.
    """

    kind = "program"
    _counted = "elements as they are"

    def at(self, threshold: float) -> Self:
        rule = self.rule.at(threshold)
        return self.reducing(self.table.score >= threshold, rule=rule)

    def reducing(self, chosen: Any, **changes: Any) -> Self:
        """The plan that reduces the chosen rows, and what was reduced before."""
        return replace(self, table=self.table.assign(removed=chosen | self.table.removed_in_fit), **changes)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StructuresByPriors(_ByReducedPriors, NetworkPlan):
    """A network's plan by reduced priors, all of which put θ so near 0 that structures can be removed.

    It is a `NetworkPlan`, and has the evidence and the reduced posterior of a `ProgramPlan`.
    """

    kind = "network by reduced priors"

    _asked: Mapping[str, Tensor] = field(default_factory=dict)

    def deciding(self, layers: Mapping[str, Candidates]) -> Self:
        asked = {site: layer.removed for site, layer in layers.items()}
        return replace(super().deciding(layers), _asked=asked)

    def _asked_of(self, name: str) -> Tensor:
        present = torch.tensor(self.table.present[self.table.layer == name].to_numpy())
        return self._asked[name][present]


def _evidence_lines(table: pd.DataFrame, what: str) -> list[str]:
    """A line for each site or group: its ΔF, and the standard error if it was estimated."""
    lines = []
    for name, change, error in zip(table[what], table.log_evidence_change, table.standard_error, strict=True):
        give_or_take = f" ± {error:.2g}" if error else ""
        lines.append(f"ΔF of {what} {name} as a whole: {change:+.4g}{give_or_take} nats")
    return lines


def _records(table: pd.DataFrame | None) -> list[dict[str, Any]] | None:
    """A table of evidence for JSON. Its k̂ is text, as JSON has no NaN."""
    if table is None:
        return None
    rows: list[dict[Any, Any]] = table.to_dict("records")
    return [{**row, "khat": str(row["khat"])} for row in rows]


def _frame(records: list[dict[str, Any]] | None) -> pd.DataFrame | None:
    return None if records is None else pd.DataFrame([{**row, "khat": float(row["khat"])} for row in records])
