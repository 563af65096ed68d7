"""Greedy search: reduce the group that raises the evidence most, and repeat while any does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from torch import Tensor

from pyro_bmrs.evidence.importance import DRAWS
from pyro_bmrs.evidence.joint_normal import reduce_group
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduce import removes_structures
from pyro_bmrs.programs.reduction import Groups
from pyro_bmrs.programs.space import LogOdds, Space, plan_of


def greedy_reduction(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    reduced_priors: Mapping[str, Any],
    *model_args: Any,
    groups: Groups | None = None,
    prior_log_odds: LogOdds = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
) -> ProgramPlan | StructuresByPriors:
    """Reduce the group that raises the evidence most, update the posterior, and repeat while any does.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> def model():
    ...     pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> pyro.clear_param_store()
    >>> guide = AutoDiagonalNormal(model, init_scale=0.1)
    >>> _ = guide()
    >>> guide.loc.data = torch.tensor([0.0, 0.1, 5.0])
    >>> plan = greedy_reduction(model, guide, {"a": 0.0})
    >>> plan.steps.group.tolist(), plan.kept
    (['a[0]', 'a[1]'], {'a': [2]})

    In a joint normal posterior, reducing one element moves the others: of two that can replace each other, one stays.
    In a mean-field posterior the result is that of `reduce`.

    Args:
        model, guide, reduced_priors, model_args, draws, seed: as in `reduce`.
        groups: what is reduced as one, as in `reduce`; None: each element on its own.
        prior_log_odds: of each group, log p(reduced)/p(full) before seeing data, in nats: a number, or one per group
            by name (0 where none is given).

    Returns:
        The plan, with `steps`: columns step, group, gain (ΔF of this group given those before, in nats) and
        log_evidence_change (of all so far).

    Raises:
        NotImplementedError: for sites whose priors depend on other latents, or have no closed form in a joint normal.
        ValueError: for overlapping groups, and as in `reduce`.
    """
    space = Space(model, guide, reduced_priors, model_args, groups, prior_log_odds, draws=draws, seed=seed)
    states = [(joint.loc, joint.covariance) for joint in space.joints]
    left, total = list(range(len(space.names))), 0.0
    room = _Room(space)
    rows: list[tuple[int, str, float, float]] = []
    while offered := [number for number in left if room.for_group(number)]:
        gains = {number: _gain(space, states, number) for number in offered}
        best = max(offered, key=lambda number: gains[number] + float(space.log_odds[number]))
        if gains[best] + float(space.log_odds[best]) < 0:
            break
        total += gains[best]
        rows.append((len(rows) + 1, space.names[best], gains[best], total))
        left.remove(best)
        room.take(best)
        states = [
            reduce_group(*state, joint.groups[best])[1:] if best in joint.groups else state
            for state, joint in zip(states, space.joints, strict=True)
        ]
    steps = pd.DataFrame(rows, columns=["step", "group", "gain", "log_evidence_change"])
    return replace(plan_of(space, steps.group.tolist(), "greedy search"), steps=steps)


class _Room:
    """How many elements of each site may still be reduced: every layer of a network keeps one structure."""

    def __init__(self, space: Space) -> None:
        floor = int(removes_structures(space.latents))
        sites = space.latents.sites
        self.left = {name: int(site.kept.sum()) - floor for name, site in sites.items()}
        # what a fit has removed is not counted
        self._counts = [
            {name: int((mask & sites[name].kept).sum()) for name, mask in chosen.items()}
            for chosen in space.selections.values()
        ]

    def for_group(self, number: int) -> bool:
        return all(count <= self.left[name] for name, count in self._counts[number].items())

    def take(self, number: int) -> None:
        for name, count in self._counts[number].items():
            self.left[name] -= count


def _gain(space: Space, states: list[tuple[Tensor, Tensor]], number: int) -> float:
    """ΔF of a group given what has been reduced."""
    gain = float(space.independent[number])
    for (loc, covariance), joint in zip(states, space.joints, strict=True):
        group = joint.groups.get(number)
        if group is not None:
            own = group.coordinates
            gain += float(group.change(loc[own], covariance[own][:, own]).log_evidence_change)
    return gain
