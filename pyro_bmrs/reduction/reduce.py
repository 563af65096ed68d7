"""From a posterior to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.evidence.importance import DRAWS
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary, read_posterior
from pyro_bmrs.networks.cuts import selections as tensors_of_side
from pyro_bmrs.networks.groups import StructureGroup, weight_of
from pyro_bmrs.networks.hooked_noise import network_of
from pyro_bmrs.networks.inputs import Inputs, bound, map_tensors, tensors_of
from pyro_bmrs.networks.modes import in_mode
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import MultiplicativeNoise, at_one, noise_layers
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.reduction.choice import Candidates, least_kept, removals
from pyro_bmrs.reduction.criteria import (
    Criterion,
    EvidenceCriterion,
    LayerStructures,
    ReducedPriors,
    check_criterion,
    joined,
)
from pyro_bmrs.reduction.latent_reduction import (
    Groups,
    check_log_odds,
    evidence_of_groups,
    evidence_of_sites,
    reduce_latents,
    selections,
)
from pyro_bmrs.reduction.latent_sites import elementary_law
from pyro_bmrs.reduction.latents import DependentPriors, Latents
from pyro_bmrs.reduction.plan import COLUMNS, Reduction


class NonFiniteScoreError(ArithmeticError):
    """A structure's score is NaN or infinite, so nothing can be said about it; it is never removed."""


def reduce(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: Criterion | Mapping[str, Any],
    *model_args: Any,
    min_kept: int = 1,
    round_to: int | None = None,
    kl_weight: float | None = None,
    prior_log_odds: float = 0.0,
    groups: Groups | None = None,
    dependent_priors: DependentPriors = "raise",
    draws: int = DRAWS,
    seed: int = 0,
) -> Reduction:
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
    >>> plan.apply(measure=False)[0]
    Linear(in_features=4, out_features=4, bias=True)

    A structure is removed where its score is ≥ 0, or if it was removed during the fit; removal is never
    undone. A layer whose structures would all go keeps the `min_kept` with the lowest scores.

    With a mapping of sites to reduced priors it asks the same of any Pyro program: would the model have more
    evidence with this prior instead?

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

    ΔF is given per element of a site (`table`), per site (`sites`) and jointly for groups of elements (`groups`);
    `reduced_posterior()` is a guide that predicts from the reduced model. Closed forms are used where there
    are any, and draws of the guide where not, with a standard error and k̂: see docs/evidence.md.

    Args:
        model: a Pyro model with noise layers; with a mapping any Pyro model.
        guide: its mean-field guide; with a mapping also one with a joint normal, such as AutoMultivariateNormal.
        criterion: `BMRS_N()`, `BMRS_U()`, `SNR()`, …: any function from layers to scores. Or a mapping from sites
            of the model to their reduced priors: distributions that broadcast to the site, or numbers and
            tensors, which are points.
        model_args: arguments to call model and guide with, where the guide is not an
            `AutoTruncatedLogNormal` that remembers its first batch.
        min_kept: structures that every layer of a network keeps, at least 1.
        round_to: keep so many more structures, those with the lowest scores, that the channels of each layer
            are a multiple of this number, such as 8, where the layer had as many: odd widths run slowly on
            much hardware. None keeps no more.
        kl_weight: of the fit, to be named wherever a ΔF is shown; default what `fit` noted in the guide.
        prior_log_odds: with a mapping, log p(reduced)/p(full) of each element before seeing data, in nats; a criterion
            has its own.
        groups: with a mapping, named sets of elements to be reduced together, as {"name": {site: elements}}, where
            elements are numbers (of a network those of the original one), a slice, a bool tensor, or ... for all.
        dependent_priors: with a mapping, what to do where a site's prior depends on another latent: "raise", or
            "average" over joint draws of the guide.
        draws, seed: with a mapping, of the posterior where ΔF has no closed form.

    Returns:
        The plan. With a mapping, `apply()` makes a smaller network of it where all sites are noise layers' and each
        reduced prior has 99 % of its mass at θ ≤ 2⁻⁴, so that what is reduced is as good as removed.

    Raises:
        NonFiniteScoreError, NonFiniteEvidenceError: naming the layer and the structures whose score is NaN or infinite.
        ImportanceError: where ΔF has to be estimated from draws, and too few carry weight.
        UnreadablePosteriorError: naming a site whose posterior is a Delta, a flow, or depends on another latent.
        ValueError, TypeError: for a bad argument, or a noise layer without a posterior in the guide.
    """
    if not isinstance(min_kept, int) or min_kept < 1:
        raise ValueError(f"min_kept must be an integer of at least 1: got {min_kept!r}")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise ValueError(f"round_to must be a positive integer or None: got {round_to!r}")
    if not callable(model):
        raise TypeError(f"model must be a Pyro model: got {type(model).__name__}")
    if not callable(guide):
        raise TypeError(f"guide must be a Pyro guide: got {type(guide).__name__}")
    if kl_weight is not None and not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be finite and not negative, or None: got {kl_weight!r}")
    arguments = arguments_of(guide, model_args)
    weight = kl_weight if kl_weight is not None else kl_weight_of(guide)
    if not isinstance(criterion, Mapping):
        if groups is not None or prior_log_odds or dependent_priors != "raise":
            raise ValueError(
                "groups, prior_log_odds and dependent_priors go with a mapping of sites to reduced priors: got "
                f"them with {criterion}"
            )
        return _reduce_structures(model, guide, criterion, arguments, min_kept, round_to, weight)
    log_odds = check_log_odds(prior_log_odds)
    latents = Latents(
        model, guide, criterion, arguments, dependent_priors=dependent_priors, draws=draws, seed=seed
    )
    if not removes_structures(latents) and (min_kept != 1 or round_to is not None):
        raise ValueError(
            "min_kept and round_to are for structures of a network: got "
            f"{min_kept} and {round_to} for {list(criterion)}"
        )
    return reduce_by_priors(latents, groups, log_odds, min_kept=min_kept, round_to=round_to, kl_weight=weight)


def kl_weight_of(guide: Callable[..., Any]) -> float:
    """Of the last fit, as it noted in the guide; 1, the ELBO, where nothing is noted."""
    return float(getattr(guide, "kl_weight", 1.0))


def arguments_of(guide: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What model and guide are called with: as given, or as the guide remembers."""
    if not given and isinstance(guide, AutoTruncatedLogNormal):
        return guide.example_arguments
    return given


def reduce_by_priors(
    latents: Latents,
    groups: Groups | None,
    log_odds: float,
    *,
    min_kept: int = 1,
    round_to: int | None = None,
    kl_weight: float,
) -> Reduction:
    """The plan that reduced priors lead to; of structures of a network where they say that θ is as good as 0."""
    if not removes_structures(latents):
        return reduce_latents(latents, groups=groups, prior_log_odds=log_odds, kl_weight=kl_weight)
    chosen = selections(latents, groups)
    laws = {name: elementary_law(name, law) for name, law in latents.given.items()}
    plan = _reduce_structures(
        latents.model,
        latents.guide,
        ReducedPriors(laws, log_odds),
        latents.args,
        min_kept,
        round_to,
        kl_weight,
    )
    return replace(
        plan,
        sites=evidence_of_sites(latents),
        groups=evidence_of_groups(latents, chosen),
        _latents=latents,
    )


# Of a reduced prior that removes structures so much lies where θ is lost at so many bits: the paper's largest interval.
_REMOVED_SHARE, _REMOVED_BITS = 0.99, 4


def removes_structures(latents: Latents) -> bool:
    """Whether all sites are noise layers' and their reduced priors say that θ is as good as 0."""
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


def _reduce_structures(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: Criterion,
    arguments: tuple[Any, ...],
    min_kept: int,
    round_to: int | None,
    weight: float,
) -> Reduction:
    check_criterion(criterion)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    posterior = read_posterior(guide, *arguments)
    layers = noise_layers(model)
    for site in layers:
        if site not in posterior:
            raise ValueError(f"guide must have a truncated log-normal posterior of {site!r}: it has none")
    originals = {site: _original(guide, site, layer, posterior) for site, layer in layers.items()}
    network = network_of(model)

    @cache
    def example_input() -> Inputs:
        return input_of(model, arguments)

    @cache
    def groups() -> dict[str, StructureGroup]:
        return structure_groups(network, example_input())

    structures = {
        site: LayerStructures(
            posterior=original.posterior,
            prior=original.prior,
            kept=original.kept,
            weight_norm=lambda site=site, original=original: original.spread(  # type: ignore[misc]
                _weight_norm(network, groups()[site]), math.nan
            ),
        )
        for site, original in originals.items()
    }
    evidence: dict[str, Tensor] = {}
    if isinstance(criterion, EvidenceCriterion):
        evidence = criterion.log_evidence_change(structures)
    if evidence and type(criterion).__call__ is EvidenceCriterion.__call__:
        scores = criterion.scores(evidence)  # type: ignore[attr-defined]
    else:
        scores = criterion(structures)
    scores = {site: scores[site].detach().double().cpu() for site in structures}
    asked = criterion.reduced_priors if isinstance(criterion, ReducedPriors) else structures
    candidates = {}
    for site, view in structures.items():
        score, kept = scores[site], view.kept.cpu()
        bad = torch.nonzero(~torch.isfinite(score) & originals[site].present.cpu()).flatten().tolist()
        if bad and site in asked:
            raise NonFiniteScoreError(
                f"{criterion} gave structures {bad[:10]} of layer {site!r} a score that is not finite "
                f"({[float(score[index]) for index in bad[:3]]}); nothing is removed"
            )
        least = least_kept(min_kept, round_to, layers[site].channels)
        candidates[site] = Candidates((score >= 0) | ~kept, score, kept, *least)
    nested = any(isinstance(module, InputSelection) for module in network.modules())
    nesting = Nesting.of(groups().values()) if nested else Nesting()
    nesting = nesting.spread({site: original.present for site, original in originals.items()})
    removed = removals(candidates, nesting)
    q = joined([view.posterior for view in structures.values()])
    every_score = torch.cat(list(scores.values()))
    columns = {
        "unit": torch.cat([original.units for original in originals.values()]),
        "loc": q.loc.double(),
        "scale": q.scale.double(),
        "mean": q.mean.double(),
        "snr": q.snr.double(),
        "score": every_score,
        "log_evidence_change": (
            torch.cat([evidence[site].double() for site in structures])
            if evidence
            else torch.full_like(every_score, torch.nan)
        ),
        "removed": torch.cat([*removed.values()]),
        "removed_in_fit": ~torch.cat([view.kept for view in structures.values()]),
        "present": torch.cat([original.present for original in originals.values()]),
    }
    names = [site for site, score in scores.items() for _ in range(len(score))]
    numbers = {name: value.detach().cpu().numpy() for name, value in columns.items()}
    table = pd.DataFrame({"layer": names, **numbers, "kl_weight": weight})
    return Reduction(
        table=table[COLUMNS],
        criterion=str(criterion),
        kl_weight=weight,
        min_kept=min_kept,
        round_to=round_to,
        channels={site: layer.channels for site, layer in layers.items() if layer.channels > 1},
        nesting=nesting,
        _asked={site: layer.removed for site, layer in candidates.items()},
        _network=network,
        _find_input=example_input,
    )


@dataclass(frozen=True)
class _Original:
    """The structures of a layer as the original network had them, those included that a fit has taken out.

    Attributes:
        units: their numbers, in order. Shape: (features,), as of all others.
        posterior: of θ; the last one of what was taken out.
        prior: of θ, broadcasting with it.
        kept: False for what has been removed.
        present: False for what has been taken out.
    """

    units: Tensor
    posterior: TruncatedLogNormal
    prior: LogUniform | TruncatedLogNormal
    kept: Tensor
    present: Tensor

    def spread(self, values: Tensor, filling: float) -> Tensor:
        """Values of the structures present, among `filling` for the others."""
        whole = torch.full(self.present.shape, filling, dtype=values.dtype, device=self.present.device)
        return whole.masked_scatter(self.present, values.to(whole.device))


def _original(
    guide: Callable[..., Any],
    site: str,
    layer: MultiplicativeNoise,
    posterior: Mapping[str, TruncatedLogNormal],
) -> _Original:
    given = posterior[site].batch_shape
    if given != layer.kept.shape:
        raise ValueError(
            f"guide must have a posterior of the {layer.features} structures of {site!r}: it has one of shape "
            f"{tuple(given)}"
        )
    all_present = torch.ones_like(layer.kept)
    gone_units = layer.units[:0]
    if isinstance(guide, AutoTruncatedLogNormal):
        gone_units = guide.site_posterior(site).gone_units
    prior = elementary(layer.prior())
    assert isinstance(prior, LogUniform | TruncatedLogNormal)
    if not len(gone_units):
        return _Original(layer.units, posterior[site], prior, layer.kept, all_present)
    assert isinstance(guide, AutoTruncatedLogNormal)
    none = torch.zeros_like(gone_units, dtype=torch.bool)
    order = torch.cat([layer.units, gone_units]).argsort()
    q = joined([posterior[site], guide.site_posterior(site).gone()])
    return _Original(
        torch.cat([layer.units, gone_units])[order],
        TruncatedLogNormal(*(t[order] for t in (q.loc, q.scale, q.log_low, q.log_high)), validate_args=False),
        LogUniform(layer.log_low, layer.log_high, validate_args=False),
        torch.cat([layer.kept, none])[order],
        torch.cat([all_present, none])[order],
    )


def _weight_norm(network: nn.Module, group: StructureGroup) -> Tensor:
    """Root mean square of the weights that make each structure, over all layers that produce it.

    Of what is only selected, such as inputs of the network, that of the weights that read it.
    """
    squares = torch.zeros(group.features, dtype=torch.float64)
    counts = torch.zeros_like(squares)
    made = [member for member in group.producers if hasattr(network.get_submodule(member.path), "weight")]
    for member in made or group.consumers:
        module, weight = (
            network.get_submodule(member.path),
            weight_of(network, member).detach().double().cpu(),
        )
        ((_, dim), *_) = tensors_of_side(module, member.side)  # the weight comes first
        # each group of a grouped convolution has columns of its own
        parts = weight.chunk(getattr(module, "groups", 1) if member.role == "consumer" else 1)
        rows = torch.cat([part.movedim(dim, 0) for part in parts]).flatten(1).square()
        squares.index_add_(0, member.units, rows.sum(1)[member.indices])
        counts.index_add_(0, member.units, torch.full_like(member.units, rows.shape[1], dtype=torch.float64))
    return (squares / counts).sqrt()


@torch.no_grad()
def input_of(model: nn.Module, arguments: tuple[Any, ...]) -> Inputs:
    """What the network inside `model` is called with when `model` is called with `arguments`."""
    network = network_of(model)
    if not arguments:
        raise ValueError("model_args must be given: a batch to call the model with")
    like = next(model.parameters())
    moved = map_tensors(lambda t: t.to(like.device, like.dtype if t.is_floating_point() else None), arguments)
    caught: list[Inputs] = []
    handle = network.register_forward_pre_hook(
        lambda _, given, keywords: caught.append(bound(network, given, keywords)), with_kwargs=True
    )
    try:
        # only looking: no statistic, generator or parameter store may notice
        with (
            in_mode(model, training=False),
            torch.random.fork_rng(),
            pyro.get_param_store().scope(),
            at_one(model),
        ):
            model(*moved)
    finally:
        handle.remove()
    if not caught or not tensors_of(caught[0]):
        raise ValueError("the network must be called by the model: pass example_input to apply()")
    return map_tensors(Tensor.detach, caught[0])
