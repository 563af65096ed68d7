"""From a posterior to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.arguments import check
from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal
from pyro_bmrs.inference.posteriors import read_posterior
from pyro_bmrs.networks.hooked_noise import network_of
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import MultiplicativeNoise, noise_layers
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.pruning.binding import Binding, input_of
from pyro_bmrs.pruning.criteria import EvidenceCriterion, ReducedPriors, text_of
from pyro_bmrs.pruning.layers import LayerStructures, joined, parameters_of, prior_of, weight_norm
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import COLUMNS
from pyro_bmrs.pruning.rule import Rule
from pyro_bmrs.pruning.scoring import Criterion, check_criterion, scores_of


class NonFiniteScoreError(ArithmeticError):
    """A structure's score is NaN or infinite: nothing can be decided about it."""


def kl_weight_of(guide: Callable[..., Any], given: float | None = None) -> float:
    """The KL weight as given; else that of the last fit, which the guide notes; else 1, that of the ELBO."""
    return float(getattr(guide, "kl_weight", 1.0)) if given is None else given


def arguments_of(guide: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What model and guide are called with: as given, or as the guide remembers."""
    if not given and isinstance(guide, AutoTruncatedLogNormal):
        return guide.example_arguments
    return given


def posteriors_of(
    model: nn.Module, guide: Callable[..., Any], arguments: tuple[Any, ...]
) -> dict[str, TruncatedLogNormal]:
    """The posterior of θ of each noise layer, by site.

    Raises:
        ValueError: where the guide has none, or one of another number of structures.
    """
    found, layers = read_posterior(guide, *arguments), noise_layers(model)
    for site in layers:
        if site not in found:
            raise ValueError(f"guide must have a truncated log-normal posterior of {site!r}: it has none")
    for site, layer in layers.items():
        if found[site].batch_shape != layer.kept.shape:
            raise ValueError(
                f"guide must have a posterior of the {layer.features} structures of {site!r}: it has one of shape "
                f"{tuple(found[site].batch_shape)}"
            )
    return {site: found[site] for site in layers}


def reduce_structures(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: Criterion,
    arguments: tuple[Any, ...] = (),
    *,
    min_kept: float = 1,
    round_to: int | None = None,
    kl_weight: float | None = None,
    known: Binding | None = None,
) -> NetworkPlan:
    """The plan of a network by a criterion: see `pyro_bmrs.reduce`.

    Args:
        known: of an earlier plan of this network, whose structures need not be found again.
    """
    check_criterion(criterion)
    check(isinstance(model, nn.Module), "model", "a torch.nn.Module", type(model), TypeError)
    assert isinstance(model, nn.Module)
    arguments = arguments_of(guide, arguments)
    posteriors, layers = posteriors_of(model, guide, arguments), noise_layers(model)
    find_input = partial(input_of, model, arguments) if arguments else None
    others = (
        {site: value for site, value in guide.mean().items() if site not in layers}
        if isinstance(guide, AutoTruncatedLogNormal)
        else {}
    )
    binding = Binding(network_of(model), find_input, model, arguments, others, known)
    structures = {
        site: _layer(guide, site, layer, posteriors[site], binding) for site, layer in layers.items()
    }
    scores, evidence = _scored(criterion, structures)
    rule = Rule(
        criterion=text_of(criterion),
        prior_log_odds=criterion.prior_log_odds if isinstance(criterion, EvidenceCriterion) else None,
        min_kept=min_kept,
        round_to=round_to,
        kl_weight=kl_weight_of(guide, kl_weight),
    )
    asked = criterion.reduced_priors if isinstance(criterion, ReducedPriors) else structures
    for site, score in scores.items():
        bad = torch.nonzero(~torch.isfinite(score) & structures[site].present.cpu()).flatten().tolist()
        if bad and site in asked:
            raise NonFiniteScoreError(
                f"{rule} gave structures {bad[:10]} of layer {site!r} a score that is not finite "
                f"({[float(score[index]) for index in bad[:3]]}); nothing is removed"
            )
    nested = any(isinstance(module, InputSelection) for module in binding.network.modules())
    nesting = Nesting.of(binding.groups.values()) if nested else Nesting()
    q = joined([layer.posterior for layer in structures.values()])
    columns = {
        "unit": torch.cat([layer.units for layer in structures.values()]),
        "loc": q.loc.double(),
        "scale": q.scale.double(),
        "mean": q.mean.double(),
        "snr": q.snr.double(),
        "score": torch.cat([*scores.values()]),
        "log_evidence_change": torch.cat([*evidence.values()]),
        "removed": torch.zeros(len(q.loc), dtype=torch.bool),
        "removed_in_fit": ~torch.cat([layer.kept for layer in structures.values()]),
        "present": torch.cat([layer.present for layer in structures.values()]),
    }
    names = [site for site, score in scores.items() for _ in range(len(score))]
    numbers = {name: value.detach().cpu().numpy() for name, value in columns.items()}
    table = pd.DataFrame({"layer": names, **numbers, "kl_weight": rule.kl_weight})
    undecided = NetworkPlan(
        table=table[COLUMNS],
        rule=rule,
        channels={site: layer.channels for site, layer in layers.items() if layer.channels > 1},
        nesting=nesting.spread({site: layer.present for site, layer in structures.items()}),
        _binding=binding,
    )
    return undecided.at(0.0)


def _scored(
    criterion: Criterion, structures: Mapping[str, LayerStructures]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(scores, ΔF or NaN where the criterion has no evidence) of each layer's structures, float64 on the CPU."""
    if not isinstance(criterion, EvidenceCriterion):
        scores = scores_of(structures, criterion(structures))
        return scores, {site: torch.full_like(score, math.nan) for site, score in scores.items()}
    evidence = scores_of(structures, criterion.log_evidence_change(structures))
    if type(criterion).__call__ is EvidenceCriterion.__call__:  # without computing ΔF again
        return {site: change + criterion.prior_log_odds for site, change in evidence.items()}, evidence
    return scores_of(structures, criterion(structures)), evidence


@dataclass(frozen=True)
class _Layer(LayerStructures):
    """The structures of a layer as the original network had them, those included that a fit has taken out.

    Attributes:
        units: their numbers, in order. Shape: (features,).
        present: False for what has been taken out; its posterior is the last one. Shape: (features,).
    """

    units: Tensor
    present: Tensor


def _layer(
    guide: object, site: str, layer: MultiplicativeNoise, posterior: TruncatedLogNormal, binding: Binding
) -> _Layer:
    prior, kept, units, present = prior_of(layer), layer.kept, layer.units, torch.ones_like(layer.kept)
    removed = guide.site_posterior(site) if isinstance(guide, AutoTruncatedLogNormal) else None
    if removed is not None and len(removed.removed_units):
        none = torch.zeros_like(removed.removed_units, dtype=torch.bool)
        units = torch.cat([units, removed.removed_units])
        order = units.argsort()
        units, kept, present = units[order], torch.cat([kept, none])[order], torch.cat([present, none])[order]
        q = joined([posterior, removed.removed_posterior()])
        posterior = TruncatedLogNormal(*(part[order] for part in parameters_of(q)), validate_args=False)
        # a layer's structures have one prior
        values = (part.flatten()[0].expand(present.shape) for part in parameters_of(prior))
        prior = type(prior)(*values, validate_args=False)

    def norms() -> Tensor:
        found = weight_norm(binding.network, binding.groups[site]).to(present.device)
        return torch.full_like(present, math.nan, dtype=found.dtype).masked_scatter(present, found)

    return _Layer(posterior, prior, kept, norms, units, present)
