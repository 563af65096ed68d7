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
from pyro_bmrs.pruning.binding import Binding
from pyro_bmrs.pruning.criteria import EvidenceCriterion, ReducedPriors, text_of
from pyro_bmrs.pruning.layers import LayerStructures, joined
from pyro_bmrs.pruning.network_plan import NetworkPlan
from pyro_bmrs.pruning.plan import COLUMNS
from pyro_bmrs.pruning.rule import Rule
from pyro_bmrs.pruning.scoring import Criterion, check_criterion, scores_of


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
    arguments: tuple[Any, ...] = (),
    *,
    min_kept: int = 1,
    round_to: int | None = None,
    kl_weight: float | None = None,
) -> NetworkPlan:
    """The plan of a network by a criterion: see `pyro_bmrs.reduce`."""
    check_criterion(criterion)
    check(isinstance(model, nn.Module), "model", "a torch.nn.Module", type(model), TypeError)
    assert isinstance(model, nn.Module)
    arguments = arguments_of(guide, arguments)
    posterior = read_posterior(guide, *arguments)
    layers = noise_layers(model)
    for site in layers:
        if site not in posterior:
            raise ValueError(f"guide must have a truncated log-normal posterior of {site!r}: it has none")
    originals = {site: _original(guide, site, layer, posterior) for site, layer in layers.items()}
    binding = Binding(network_of(model), partial(input_of, model, arguments) if arguments else None)
    structures = {
        site: LayerStructures(
            posterior=original.posterior,
            prior=original.prior,
            kept=original.kept,
            weight_norm=lambda site=site, original=original: original.spread(  # type: ignore[misc]
                _weight_norm(binding.network, binding.groups[site]), math.nan
            ),
        )
        for site, original in originals.items()
    }
    scores, evidence = _scored(criterion, structures)
    rule = Rule(
        criterion=text_of(criterion),
        prior_log_odds=criterion.prior_log_odds if isinstance(criterion, EvidenceCriterion) else None,
        min_kept=min_kept,
        round_to=round_to,
        kl_weight=kl_weight_of(guide) if kl_weight is None else kl_weight,
    )
    asked = criterion.reduced_priors if isinstance(criterion, ReducedPriors) else structures
    for site, score in scores.items():
        bad = torch.nonzero(~torch.isfinite(score) & originals[site].present.cpu()).flatten().tolist()
        if bad and site in asked:
            raise NonFiniteScoreError(
                f"{rule} gave structures {bad[:10]} of layer {site!r} a score that is not finite "
                f"({[float(score[index]) for index in bad[:3]]}); nothing is removed"
            )
    nested = any(isinstance(module, InputSelection) for module in binding.network.modules())
    nesting = Nesting.of(binding.groups.values()) if nested else Nesting()
    q = joined([view.posterior for view in structures.values()])
    columns = {
        "unit": torch.cat([original.units for original in originals.values()]),
        "loc": q.loc.double(),
        "scale": q.scale.double(),
        "mean": q.mean.double(),
        "snr": q.snr.double(),
        "score": torch.cat([*scores.values()]),
        "log_evidence_change": torch.cat([*evidence.values()]),
        "removed": torch.zeros(len(q.loc), dtype=torch.bool),
        "removed_in_fit": ~torch.cat([view.kept for view in structures.values()]),
        "present": torch.cat([original.present for original in originals.values()]),
    }
    names = [site for site, score in scores.items() for _ in range(len(score))]
    numbers = {name: value.detach().cpu().numpy() for name, value in columns.items()}
    table = pd.DataFrame({"layer": names, **numbers, "kl_weight": rule.kl_weight})
    undecided = NetworkPlan(
        table=table[COLUMNS],
        rule=rule,
        channels={site: layer.channels for site, layer in layers.items() if layer.channels > 1},
        nesting=nesting.spread({site: original.present for site, original in originals.items()}),
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
    if type(criterion).__call__ is EvidenceCriterion.__call__:
        return scores_of(structures, criterion.scores(evidence)), evidence
    return scores_of(structures, criterion(structures)), evidence


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
