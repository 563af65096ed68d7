"""Exhaustive search: ΔF of every combination of groups from one posterior, and the posterior over these models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_bmrs.arguments import check, is_number, is_whole
from pyro_bmrs.evidence.importance import DRAWS
from pyro_bmrs.evidence.joint_normal import all_subsets
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduction import Groups
from pyro_bmrs.programs.space import Joint, LogOdds, Space, plan_of
from pyro_bmrs.progress import bar

MOST_GROUPS = 20
# Madigan & Raftery (1994) discard models that are so many times less probable than the best.
OCCAMS_RATIO = 20.0


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
        """For each group the probability that it is reduced, summed over all models."""
        probability = self.probability
        models = torch.arange(len(probability), device=probability.device)
        return {
            name: float(probability[(models >> k & 1).bool()].sum()) for k, name in enumerate(self.groups)
        }

    def reduced(self, model: int) -> list[str]:
        """The groups that a model reduces."""
        count = len(self.log_evidence_change)
        check(is_whole(model) and model < count, "model", f"a number below {count}", model)
        return [name for k, name in enumerate(self.groups) if model >> k & 1]

    def table(self, count: int = 10) -> pd.DataFrame:
        """The most probable models: columns model, reduced, log_evidence_change (nats), probability."""
        check(is_whole(count, 1), "count", "a positive integer", count)
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
        """The models that are at most `ratio` times less probable than the best (Madigan & Raftery, 1994).

        Args:
            ratio: above 1.
            simpler_first: also leave out a model if a more probable one reduces the same groups and more.

        Returns:
            As `table`, the most probable first.
        """
        check(is_number(ratio) and ratio > 1, "ratio", "a number above 1", ratio)
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
            ValueError: if there is no such model.
        """
        model = self.best if model is None else model
        what = f"model {model} of {len(self.log_evidence_change)}"
        return plan_of(self._space, self.reduced(model), what)

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

    In joint normal posteriors the models share their work along a tree: 2²⁰ models take seconds.

    Args:
        model, guide, reduced_priors, model_args, groups, prior_log_odds, draws, seed: as in `greedy_reduction`.
        progress: show a bar on the terminal; None: where standard error is one.

    Raises:
        ValueError: for more than 20 groups, and as in `greedy_reduction`.
        NotImplementedError: as in `greedy_reduction`.
    """
    space = Space(model, guide, reduced_priors, model_args, groups, prior_log_odds, draws=draws, seed=seed)
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


def _over_all(joint: Joint, count: int, advance: Callable[[int], None]) -> Tensor:
    """ΔF of all 2ⁿ models in a joint normal, in which only some of the groups lie."""
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
