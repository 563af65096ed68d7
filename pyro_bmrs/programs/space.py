"""The groups of latents that a search may reduce, and the plan of those it has chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.evidence.joint_normal import Group, by_themselves
from pyro_bmrs.inference.blocks import JointNormalBlock
from pyro_bmrs.programs.latents import Latents
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduce import reduce_by_priors
from pyro_bmrs.programs.reduction import Groups, check_log_odds, selections
from pyro_bmrs.programs.second_opinion import choices_of, second_opinion
from pyro_bmrs.programs.sites import Selection

LogOdds = float | Mapping[str, float]


@dataclass(frozen=True)
class Joint:
    """A joint normal, and the coordinates of each group in it. Coordinates of no group are left out."""

    loc: Tensor
    covariance: Tensor
    groups: dict[int, Group]  # by the group's number


class Space:
    """The groups that may be reduced, and what ΔF of any combination of them needs.

    Args:
        model, guide, reduced_priors, model_args, groups: as in `reduce`.
        prior_log_odds: of each group, or one for all.
        sampling: draws and seed, as in `reduce`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        reduced_priors: Mapping[str, Any],
        model_args: tuple[Any, ...],
        groups: Groups | None,
        prior_log_odds: LogOdds,
        **sampling: int,
    ) -> None:
        # dependent priors are refused here, where the message can say what to do instead
        latents = Latents(model, guide, reduced_priors, model_args, dependent_priors="average", **sampling)
        self.latents = latents
        dependent = [name for name, site in latents.sites.items() if site.parents]
        if dependent:
            raise NotImplementedError(
                f"no search over {dependent}, whose priors depend on other latents: reduce groups by "
                "reduce(…, groups=…, dependent_priors='average')"
            )
        self.selections: dict[str, Selection] = (
            _single_elements(latents) if groups is None else selections(latents, groups)
        )
        self._check_disjoint()
        self.names = tuple(self.selections)
        self.log_odds = torch.tensor(
            [_log_odds_of(name, prior_log_odds) for name in self.names], dtype=torch.float64
        )
        if isinstance(prior_log_odds, Mapping) and set(prior_log_odds) - set(self.names):
            raise ValueError(
                f"prior_log_odds must be of the groups {list(self.names)}: got {sorted(prior_log_odds)}"
            )
        self.independent = torch.zeros(len(self.names), dtype=torch.float64)
        self.joints = self._read()
        second_opinion(latents, choices_of(latents, self.selections))

    def _check_disjoint(self) -> None:
        for name, site in self.latents.sites.items():
            times = torch.zeros(site.shape, dtype=torch.long, device=site.kept.device)
            for chosen in self.selections.values():
                if name in chosen:
                    times += chosen[name]
            twice = torch.nonzero(times.flatten() > 1).flatten().tolist()
            if twice:
                raise ValueError(
                    f"groups must not share elements: elements {twice[:10]} of {name!r} are in two"
                )

    def _read(self) -> list[Joint]:
        members: dict[int, tuple[JointNormalBlock, dict[int, Group]]] = {}
        for number, chosen in enumerate(self.selections.values()):
            for block, masks in self.latents.by_block(self.latents.chosen(chosen)):
                if isinstance(block, JointNormalBlock):
                    groups = members.setdefault(id(block), (block, {}))[1]
                    groups[number] = self.latents.group(masks)
                else:
                    found = self.latents.of_block(block, masks)
                    self.independent[number] += found.log_evidence_change.cpu()
        return [_joint(block, groups) for block, groups in members.values()]


def _joint(block: JointNormalBlock, groups: dict[int, Group]) -> Joint:
    coordinates, own = by_themselves(list(groups.values()))
    return Joint(block.loc[coordinates], block.covariance(coordinates), dict(zip(groups, own, strict=True)))


def _single_elements(latents: Latents) -> dict[str, Selection]:
    groups: dict[str, Selection] = {}
    for name, site in latents.sites.items():
        for number in torch.nonzero(site.kept.flatten()).flatten().tolist():
            mask = torch.zeros(site.shape.numel(), dtype=torch.bool, device=site.kept.device)
            mask[number] = True
            groups[f"{name}[{int(site.units[number])}]"] = {name: mask.reshape(site.shape)}
    return groups


def _log_odds_of(name: str, given: LogOdds) -> float:
    return check_log_odds(given.get(name, 0.0) if isinstance(given, Mapping) else given)


def plan_of(space: Space, names: Sequence[str], what: str) -> ProgramPlan | StructuresByPriors:
    """The plan that reduces the named groups. In a network every layer keeps one structure.

    The scores in its table are ΔF of each element alone plus the prior log-odds of its group. They did not decide: the
    groups were judged together, and the rule has no threshold.
    """
    latents = space.latents
    plan = reduce_by_priors(latents, None, 0.0)
    odds = {name: torch.zeros(site.shape, dtype=torch.float64) for name, site in latents.sites.items()}
    chosen = {name: torch.zeros(site.shape, dtype=torch.bool) for name, site in latents.sites.items()}
    for group, log_odds in zip(space.names, space.log_odds.tolist(), strict=True):
        for name, mask in space.selections[group].items():
            odds[name][mask.cpu()] = log_odds
            if group in names:
                chosen[name] |= mask.cpu()
    table = plan.table.copy()
    asked = table.present & table.layer.isin(list(latents.sites))
    # in the order of the table
    rows = [name for name in plan.layers if name in latents.sites]
    flat = torch.cat([odds[name].flatten() for name in rows]).numpy()
    table.loc[asked, "score"] = table.log_evidence_change[asked] + flat
    taken = table.removed_in_fit.copy()
    taken[asked] |= torch.cat([chosen[name].flatten() for name in rows]).numpy()
    rule = replace(
        plan.rule,
        criterion=f"{what} by {plan.rule.criterion}",
        prior_log_odds=_odds_of_rule(space),
        threshold=None,
    )
    plan = replace(plan, table=table, rule=rule)
    if isinstance(plan, ProgramPlan):
        return plan.reducing(taken)
    layers = {
        layer: replace(candidates, removed=torch.tensor(taken[table.layer == layer].to_numpy()))
        for layer, candidates in plan.candidates(math.inf).items()
    }
    return plan.deciding(layers)


def _odds_of_rule(space: Space) -> float | dict[str, float]:
    """The prior log-odds of all groups: one number where they are equal."""
    odds = dict(zip(space.names, space.log_odds.tolist(), strict=True))
    return next(iter(odds.values()), 0.0) if len({*odds.values()}) <= 1 else odds
