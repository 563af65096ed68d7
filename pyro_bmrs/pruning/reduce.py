"""From a posterior to a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary, read_posterior
from pyro_bmrs.inference.untouched import untouched
from pyro_bmrs.networks.cuts import selections as tensors_of_side
from pyro_bmrs.networks.groups import StructureGroup, weight_of
from pyro_bmrs.networks.hooked_noise import network_of
from pyro_bmrs.networks.inputs import Inputs, bound, map_tensors, tensors_of
from pyro_bmrs.networks.nesting import Nesting
from pyro_bmrs.networks.noise import MultiplicativeNoise, at_one, noise_layers
from pyro_bmrs.networks.selection import InputSelection
from pyro_bmrs.networks.structures import structure_groups
from pyro_bmrs.pruning.criteria import (
    Criterion,
    EvidenceCriterion,
    LayerStructures,
    ReducedPriors,
    check_criterion,
    joined,
)
from pyro_bmrs.pruning.decision import Candidates, least_kept, removals
from pyro_bmrs.pruning.plan import COLUMNS, Reduction


class NonFiniteScoreError(ArithmeticError):
    """A structure's score is NaN or infinite, so nothing can be said about it; it is never removed."""


def kl_weight_of(guide: Callable[..., Any]) -> float:
    """Of the last fit, as it noted in the guide; 1, the ELBO, where nothing is noted."""
    return float(getattr(guide, "kl_weight", 1.0))


def arguments_of(guide: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What model and guide are called with: as given, or as the guide remembers."""
    if not given and isinstance(guide, AutoTruncatedLogNormal):
        return guide.example_arguments
    return given


def reduce_structures(
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
        with untouched(model), at_one(model):
            model(*moved)
    finally:
        handle.remove()
    if not caught or not tensors_of(caught[0]):
        raise ValueError("the network must be called by the model: pass example_input to apply()")
    return map_tensors(Tensor.detach, caught[0])
