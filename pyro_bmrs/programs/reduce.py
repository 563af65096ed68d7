"""From a posterior to a plan: of a network's structures by a criterion, of any program's latents by reduced priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_bmrs.arguments import check, is_floor, is_number, is_whole
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.evidence.importance import DRAWS
from pyro_bmrs.inference.laplace import AutoKroneckerLaplace
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.programs.latents import DependentPriors, Latents
from pyro_bmrs.programs.plan import ProgramPlan, StructuresByPriors
from pyro_bmrs.programs.reduction import (
    Groups,
    check_log_odds,
    evidence_tables,
    reduce_latents,
    selections,
)
from pyro_bmrs.programs.second_opinion import choices, second_opinion
from pyro_bmrs.programs.sites import elementary_law
from pyro_bmrs.pruning.criteria import BMRS_N, ReducedPriors, text_of
from pyro_bmrs.pruning.laplace_plan import of_a_copy, reduce_by_laplace
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.reduce import reduce_structures
from pyro_bmrs.pruning.removal_path import RemovalOrder
from pyro_bmrs.pruning.scoring import Criterion


def reduce(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: Criterion | Mapping[str, Any] | RemovalOrder | None = None,
    *model_args: Any,
    min_kept: float = 1,
    round_to: int | None = None,
    kl_weight: float | None = None,
    prior_log_odds: float = 0.0,
    groups: Groups | None = None,
    dependent_priors: DependentPriors = "raise",
    draws: int = DRAWS,
    seed: int = 0,
) -> NetworkPlan | ProgramPlan:
    """Decide, from the guide's parameters alone, which structures (or latents) the model is better without.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model)
    >>> _ = guide(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    >>> plan = bmrs.reduce(model, guide, bmrs.Random(fraction=0.5, seed=1))
    >>> plan.widths().values.tolist()
    [['2', 8, 4]]
    >>> plan.apply()[0]
    Linear(in_features=4, out_features=4, bias=True)

    A structure is removed where its score is ≥ 0, or if the fit has removed it; removal is never undone. Every layer
    keeps at least `min_kept` structures, those with the lowest scores.

    With a mapping of sites to reduced priors it asks of any Pyro program: would the model have more evidence with
    this prior instead?

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def coins(heads):
    ...     bias = pyro.sample("bias", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("heads", dist.Binomial(20, logits=bias).to_event(1), obs=heads)
    >>> guide = AutoNormal(coins, init_loc_fn=lambda site: torch.tensor([0.1, 2.0]), init_scale=0.4)
    >>> heads = torch.tensor([11.0, 18.0])
    >>> _ = guide(heads)
    >>> bmrs.reduce(coins, guide, {"bias": 0.0}, heads).table.log_evidence_change.round(2).tolist()
    [0.89, -11.58]

    The plan has ΔF of each element (`table`), of each site (`sites`) and of groups of elements (`groups`).
    `reduced_posterior()` is a guide that predicts from the reduced model. ΔF has a closed form for most laws; elsewhere
    it is estimated from draws, with a standard error and k̂. The model itself gives a second opinion
    (`checked`), and a warning where the guide is wrong: see docs/evidence.md.

    With an `AutoKroneckerLaplace` of a trained network the plan is a `LaplacePlan`: a path of removals, and the place
    on it where the evidence is largest.

    Args:
        model: a Pyro model with noise layers; with a mapping any Pyro model.
        guide: its mean-field guide; with a mapping also one with a joint normal, such as AutoMultivariateNormal.
        criterion: `BMRS_N()` (the default), `BMRS_U()`, `SNR()`, …, or any function from layers to scores. Or a
            mapping from sites of the model to their reduced priors: distributions that broadcast to the site, or
            numbers and tensors, which are points. With an `AutoKroneckerLaplace` a `RemovalOrder`.
        model_args: what model and guide are called with. An `AutoTruncatedLogNormal` remembers its first batch, and
            needs none.
        min_kept: structures that every layer of a network keeps, at least 1; or, as a float between 0 and 1, the share
            of its original structures.
        round_to: keep more structures, those with the lowest scores, until the channels of each layer are a multiple
            of this number, such as 8: other widths run slowly on much hardware. None keeps no more.
        kl_weight: of the fit, shown beside each ΔF; default what `fit` noted in the guide.
        prior_log_odds: with a mapping, log p(reduced)/p(full) of each element before seeing data, in nats. A criterion
            has its own.
        groups: with a mapping, named sets of elements to be reduced together, as {"name": {site: elements}}. Elements
            are numbers (in a network those of the original one), a slice, a bool tensor, or ... for all.
        dependent_priors: with a mapping, what to do where a site's prior depends on another latent: "raise", or
            "average" over joint draws of the guide.
        draws, seed: with a mapping, number and seed of draws, used only where ΔF has no closed form.

    Returns:
        The plan. With a mapping, `apply()` makes a smaller network if all sites belong to noise layers and each
        reduced prior has 99 % of its mass at θ ≤ 2⁻⁴: such structures can be removed.

    Warns:
        UnreliableEstimateWarning: with a mapping, where ΔF by the guide is not what the model itself says, where a
            mean-field guide takes strongly correlated latents for independent, or where k̂ is too large.

    Raises:
        NonFiniteScoreError, NonFiniteEvidenceError: naming the layer and the structures whose score is NaN or infinite.
        ImportanceError: where ΔF has to be estimated from draws, and too few carry weight.
        UnreadablePosteriorError: naming a site whose posterior is a Delta, a flow, or depends on another latent.
        ValueError, TypeError: for a bad argument, or a noise layer without a posterior in the guide.
    """
    check(is_floor(min_kept), "min_kept", "an integer of at least 1, or a share between 0 and 1", min_kept)
    check(round_to is None or is_whole(round_to, 1), "round_to", "a positive integer or None", round_to)
    check(callable(model), "model", "a Pyro model", type(model), TypeError)
    check(callable(guide), "guide", "a Pyro guide", type(guide), TypeError)
    if isinstance(guide, AutoKroneckerLaplace):
        check(model is guide.model, "model", "the one that the guide was made for", type(model))
        order = RemovalOrder() if criterion is None else criterion
        good = isinstance(order, RemovalOrder)
        check(good, "criterion", "a RemovalOrder for this guide, or None", order, TypeError)
        assert isinstance(order, RemovalOrder)
        of_others = {
            "model_args": model_args, "kl_weight": kl_weight is not None, "groups": groups is not None,
            "prior_log_odds": prior_log_odds, "dependent_priors": dependent_priors != "raise",
        }  # fmt: skip
        given = [name for name, some in of_others.items() if some]
        if given:
            raise ValueError(f"{', '.join(given)} must be left out with an AutoKroneckerLaplace")
        return reduce_by_laplace(of_a_copy(guide), order, min_kept=min_kept, round_to=round_to)
    criterion = BMRS_N() if criterion is None else criterion
    good = not isinstance(criterion, RemovalOrder)
    check(good, "guide", "an AutoKroneckerLaplace for a RemovalOrder", type(guide), TypeError)
    assert not isinstance(criterion, RemovalOrder)
    good = kl_weight is None or (is_number(kl_weight) and kl_weight >= 0)
    check(good, "kl_weight", "finite and not negative, or None", kl_weight)
    if not isinstance(criterion, Mapping):
        if groups is not None or prior_log_odds or dependent_priors != "raise":
            raise ValueError(
                "groups, prior_log_odds and dependent_priors go with a mapping of sites to reduced priors: got "
                f"them with {text_of(criterion)}"
            )
        return reduce_structures(
            model, guide, criterion, model_args, min_kept=min_kept, round_to=round_to, kl_weight=kl_weight
        ).settled()
    log_odds = check_log_odds(prior_log_odds)
    latents = Latents(
        model, guide, criterion, model_args, dependent_priors=dependent_priors, draws=draws, seed=seed
    )
    if not removes_structures(latents) and (min_kept != 1 or round_to is not None):
        raise ValueError(
            "min_kept and round_to are for structures of a network: got "
            f"{min_kept} and {round_to} for {list(criterion)}"
        )
    plan = reduce_by_priors(
        latents, groups, log_odds, min_kept=min_kept, round_to=round_to, kl_weight=kl_weight
    )
    asked = choices(latents, selections(latents, groups), log_odds)
    return replace(plan, checked=second_opinion(latents, asked, log_odds))


def reduce_by_priors(
    latents: Latents,
    groups: Groups | None,
    log_odds: float,
    *,
    min_kept: float = 1,
    round_to: int | None = None,
    kl_weight: float | None = None,
) -> ProgramPlan | StructuresByPriors:
    """The plan by reduced priors. It removes structures of a network if all of them put θ near 0."""
    if not removes_structures(latents):
        return reduce_latents(latents, groups=groups, prior_log_odds=log_odds, kl_weight=kl_weight)
    chosen = selections(latents, groups)
    laws = {name: elementary_law(name, law) for name, law in latents.given.items()}
    plan = reduce_structures(
        latents.model, latents.guide, ReducedPriors(laws, log_odds), latents.args,
        min_kept=min_kept, round_to=round_to, kl_weight=kl_weight,
    )  # fmt: skip
    parts = {entry.name: getattr(plan, entry.name) for entry in fields(plan)}
    return StructuresByPriors(**parts, **evidence_tables(latents, chosen), _latents=latents).at(0.0).settled()


# A reduced prior removes structures if it has this share of its mass below 2^-bits, the paper's largest interval.
_REMOVED_SHARE, _REMOVED_BITS = 0.99, 4


def removes_structures(latents: Latents) -> bool:
    """Whether all sites belong to noise layers, and their reduced priors put θ near 0."""
    layers = noise_layers(latents.model) if isinstance(latents.model, nn.Module) else {}

    def as_good_as_zero(law: Any) -> bool:
        if isinstance(law, Delta):
            return bool((law.v <= 2.0**-_REMOVED_BITS).all())
        below: Tensor = law.cdf(torch.full(law.batch_shape, 2.0**-_REMOVED_BITS, dtype=torch.float64))
        return bool((below >= _REMOVED_SHARE).all())

    known = (LogUniform, TruncatedLogNormal, Delta)
    return all(
        name in layers and isinstance(site.reduced_prior, known) and as_good_as_zero(site.reduced_prior)
        for name, site in latents.sites.items()
    )
