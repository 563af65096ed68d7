"""Which groups of latents to reduce together: one after the other, or every combination."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_bmrs.evidence.importance import DRAWS
from pyro_bmrs.evidence.joint_normal import GroupReduction, all_subsets, by_themselves, reduce_group
from pyro_bmrs.inference.posteriors import JointNormalBlock
from pyro_bmrs.programs.latents import Latents
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduce import reduce_by_priors, removes_structures
from pyro_bmrs.programs.reduction import Groups, check_log_odds, selections
from pyro_bmrs.programs.sites import Selection
from pyro_bmrs.progress import bar
from pyro_bmrs.pruning.reduce import arguments_of, kl_weight_of

MOST_GROUPS = 20
# Madigan & Raftery (1994): models that much less probable than the best are discredited.
OCCAMS_RATIO = 20.0

LogOdds = float | Mapping[str, float]


@dataclass(frozen=True)
class _Joint:
    """A joint normal and what each group has in it; coordinates of no group are left out."""

    loc: Tensor
    covariance: Tensor
    groups: dict[int, GroupReduction]  # by the group's number


class _Space:
    """The groups that may be reduced, and all that ΔF of any combination needs."""

    def __init__(self, latents: Latents, groups: Groups | None, prior_log_odds: LogOdds) -> None:
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

    def _read(self) -> list[_Joint]:
        members: dict[int, tuple[JointNormalBlock, dict[int, GroupReduction]]] = {}
        for number, chosen in enumerate(self.selections.values()):
            for block, masks in self.latents.by_block(self.latents.chosen(chosen)):
                if isinstance(block, JointNormalBlock):
                    groups = members.setdefault(id(block), (block, {}))[1]
                    groups[number] = self.latents.group(masks)
                else:
                    found = self.latents.of_block(block, masks)
                    self.independent[number] += found.log_evidence_change.cpu()
        return [_joint(block, groups) for block, groups in members.values()]


def _joint(block: JointNormalBlock, groups: dict[int, GroupReduction]) -> _Joint:
    coordinates, own = by_themselves(list(groups.values()))
    return _Joint(block.loc[coordinates], block.covariance(coordinates), dict(zip(groups, own, strict=True)))


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

    Where the posterior is a joint normal, reducing one element moves what is left, so that of two that can stand
    in for each other one stays. A mean-field posterior knows of no such thing: there it is `reduce`.

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
    arguments = arguments_of(guide, model_args)
    # what depends on other latents is refused by the space, which knows what to do instead
    latents = Latents(
        model, guide, reduced_priors, arguments, dependent_priors="average", draws=draws, seed=seed
    )
    space = _Space(latents, groups, prior_log_odds)
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
    return replace(_plan(space, steps.group.tolist(), "greedy search"), steps=steps)


class _Room:
    """How many elements of each site may still go: of a network's structures every layer keeps one."""

    def __init__(self, space: _Space) -> None:
        floor = int(removes_structures(space.latents))
        sites = space.latents.sites
        self.left = {name: int(site.kept.sum()) - floor for name, site in sites.items()}
        # what a fit has removed before takes no room
        self._counts = [
            {name: int((mask & sites[name].kept).sum()) for name, mask in chosen.items()}
            for chosen in space.selections.values()
        ]

    def for_group(self, number: int) -> bool:
        return all(count <= self.left[name] for name, count in self._counts[number].items())

    def take(self, number: int) -> None:
        for name, count in self._counts[number].items():
            self.left[name] -= count


def _gain(space: _Space, states: list[tuple[Tensor, Tensor]], number: int) -> float:
    """ΔF of a group given what has been reduced."""
    gain = float(space.independent[number])
    for (loc, covariance), joint in zip(states, space.joints, strict=True):
        group = joint.groups.get(number)
        if group is not None:
            own = group.coordinates
            gain += float(group.change(loc[own], covariance[own][:, own]).log_evidence_change)
    return gain


def _plan(space: _Space, names: Sequence[str], what: str) -> ProgramPlan | StructuresByPriors:
    """The plan that reduces the named groups and what goes along; of a network every layer keeps one.

    A score in its table is the element's ΔF alone and the prior log-odds of its group. It did not decide: the groups
    were judged together, so the rule has no threshold.
    """
    latents = space.latents
    plan = reduce_by_priors(latents, None, 0.0, kl_weight=kl_weight_of(latents.guide))
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


def _odds_of_rule(space: _Space) -> float | dict[str, float]:
    """The prior log-odds of all groups: one number where they are equal."""
    odds = dict(zip(space.names, space.log_odds.tolist(), strict=True))
    return next(iter(odds.values()), 0.0) if len({*odds.values()}) <= 1 else odds


@dataclass(frozen=True)
class ModelPosterior:
    """The posterior over the 2ⁿ models that n groups span.

    Attributes:
        groups: their names. Model i reduces group k where bit k of i is 1; model 0 is the full one.
        log_evidence_change: of each model against model 0, in nats. Shape: (2ⁿ,).
        log_prior_odds: of each model against model 0: the sum over what it reduces. Shape: (2ⁿ,).
    """

    groups: tuple[str, ...]
    log_evidence_change: Tensor
    log_prior_odds: Tensor
    _space: Any = field(default=None, repr=False)

    @property
    def log_probability(self) -> Tensor:
        """log p(model | y) ∝ ΔF + log prior odds, normalised over all models. Shape: (2ⁿ,)."""
        return (self.log_evidence_change + self.log_prior_odds).log_softmax(0)

    @property
    def probability(self) -> Tensor:
        """p(model | y). Shape: (2ⁿ,)."""
        return self.log_probability.exp()

    @property
    def best(self) -> int:
        """The most probable model."""
        return int(self.log_probability.argmax())

    def reduction_probability(self) -> dict[str, float]:
        """For each group the probability that it is reduced, over all models."""
        probability = self.probability
        models = torch.arange(len(probability), device=probability.device)
        return {
            name: float(probability[(models >> k & 1).bool()].sum()) for k, name in enumerate(self.groups)
        }

    def reduced(self, model: int) -> list[str]:
        """The groups that a model reduces."""
        if not 0 <= model < len(self.log_evidence_change):
            raise ValueError(f"model must be a number below {len(self.log_evidence_change)}: got {model}")
        return [name for k, name in enumerate(self.groups) if model >> k & 1]

    def table(self, count: int = 10) -> pd.DataFrame:
        """The most probable models: columns model, reduced, log_evidence_change (nats), probability."""
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"count must be a positive integer: got {count!r}")
        top = self.log_probability.topk(min(count, len(self.log_evidence_change))).indices
        return self._rows(top)

    def _rows(self, models: Tensor) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "model": models.tolist(),
                "reduced": [", ".join(self.reduced(model)) for model in models.tolist()],
                "log_evidence_change": self.log_evidence_change[models].tolist(),
                "probability": self.probability[models].tolist(),
            }
        )

    def occams_window(self, ratio: float = OCCAMS_RATIO, *, simpler_first: bool = False) -> pd.DataFrame:
        """The models no more than `ratio` times less probable than the best (Madigan & Raftery, 1994).

        Args:
            ratio: above 1.
            simpler_first: also leave out a model if one that reduces all it reduces, and more, is more probable.

        Returns:
            As `table`, the most probable first.
        """
        if not ratio > 1:
            raise ValueError(f"ratio must be above 1: got {ratio!r}")
        log_probability = self.log_probability
        near = torch.nonzero(log_probability >= log_probability.max() - torch.tensor(ratio).log()).flatten()
        if simpler_first:
            # for each model the largest probability of those that reduce all it reduces
            simpler = log_probability.clone()
            for bit in range(len(self.groups)):
                pairs = simpler.view(-1, 2, 2**bit)
                pairs[:, 0] = torch.maximum(pairs[:, 0], pairs[:, 1])
            near = near[simpler[near] <= log_probability[near]]
        near = near[log_probability[near].argsort(descending=True, stable=True)]
        return self._rows(near)

    def plan(self, model: int | None = None) -> ProgramPlan | StructuresByPriors:
        """The plan of one model, by default the most probable: its `reduced_posterior()` predicts.

        In a network every layer keeps one structure, whatever the model says.

        Raises:
            ValueError: for a model that there is none of.
        """
        names = self.reduced(self.best if model is None else model)
        what = f"model {self.best if model is None else model} of {len(self.log_evidence_change)}"
        return _plan(self._space, names, what)

    def __str__(self) -> str:
        total = len(self.log_evidence_change)
        lines = [f"{total:,} models; the most probable reduce:"]
        for row in self.table(5).itertuples():
            text = str(row.reduced) or "nothing"
            lines.append(f"  {row.probability:8.4f}  {row.log_evidence_change:+9.3f} nats  {text}")
        return "\n".join(lines)


def exhaustive_reduction(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    reduced_priors: Mapping[str, Any],
    *model_args: Any,
    groups: Groups | None = None,
    prior_log_odds: LogOdds = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool | None = None,
) -> ModelPosterior:
    """ΔF of every combination of up to 20 groups, from one posterior, and the posterior over these models.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDiagonalNormal
    >>> def model():
    ...     pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> pyro.clear_param_store()
    >>> guide = AutoDiagonalNormal(model, init_scale=0.1)
    >>> _ = guide()
    >>> guide.loc.data = torch.tensor([0.0, 5.0])
    >>> found = exhaustive_reduction(model, guide, {"a": 0.0})
    >>> found.reduced(found.best), round(float(found.probability.sum()), 6)
    (['a[0]'], 1.0)

    Joint normal posteriors are reduced along a tree in which the models share their work: 2²⁰ models take seconds.

    Args:
        model, guide, reduced_priors, model_args, groups, prior_log_odds, draws, seed: as in `greedy_reduction`.
        progress: show a bar on the terminal; None: where standard error is one.

    Raises:
        ValueError: for more than 20 groups, and as in `greedy_reduction`.
        NotImplementedError: as in `greedy_reduction`.
    """
    arguments = arguments_of(guide, model_args)
    # what depends on other latents is refused by the space, which knows what to do instead
    latents = Latents(
        model, guide, reduced_priors, arguments, dependent_priors="average", draws=draws, seed=seed
    )
    space = _Space(latents, groups, prior_log_odds)
    count = len(space.names)
    if count > MOST_GROUPS:
        raise ValueError(
            f"groups must be at most {MOST_GROUPS} for every combination of them: there are {count}; name fewer, or "
            "use greedy_reduction"
        )
    change = _sums(space.independent)
    with torch.no_grad(), bar("models", len(space.joints) * 2**count, progress) as advance:
        for joint in space.joints:
            change = change + _over_all(joint, count, advance)
    return ModelPosterior(space.names, change, _sums(space.log_odds), space)


def _sums(values: Tensor) -> Tensor:
    """The sum over each subset of n values. Shape: (n,) → (2ⁿ,)."""
    total = torch.zeros(1, dtype=values.dtype)
    for value in values:
        total = torch.cat([total, total + value])
    return total


def _over_all(joint: _Joint, count: int, advance: Callable[[int], None]) -> Tensor:
    """ΔF in a joint normal of all 2ⁿ models, of which only some groups have a part in it."""
    numbers = list(joint.groups)
    scale = 2 ** (count - len(numbers))
    own = all_subsets(
        joint.loc, joint.covariance, list(joint.groups.values()), lambda done: advance(done * scale)
    ).cpu()
    if len(numbers) == count:
        return own
    models = torch.arange(2**count)
    index = torch.zeros_like(models)
    for position, number in enumerate(numbers):
        index |= (models >> number & 1) << position
    return own[index]
