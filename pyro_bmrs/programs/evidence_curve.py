"""ΔF as a function of the reduced prior: which one the data prefer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyro_bmrs.arguments import check
from pyro_bmrs.evidence import log_evidence_change
from pyro_bmrs.evidence.joint_normal import GroupReduction, all_subsets, as_one, by_themselves
from pyro_bmrs.inference.blocks import JointNormalBlock
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.programs.latents import Latents
from pyro_bmrs.programs.sites import LatentSite, elementary_law, group_of, per_element
from pyro_bmrs.pruning.criteria import EvidenceCriterion
from pyro_bmrs.pruning.layers import joined, prior_of
from pyro_bmrs.pruning.reduce import arguments_of, posteriors_of


def evidence_curve(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: EvidenceCriterion | Mapping[str, Callable[[Tensor], Distribution]],
    *model_args: Any,
    prior_log_odds: float | None = None,
    **parameter: Sequence[float] | Tensor,
) -> pd.DataFrame:
    """The evidence for many values of one parameter of the reduced prior.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model, init_loc=-18.0, init_scale=2.0)
    >>> _ = guide(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    >>> curve = evidence_curve(model, guide, bmrs.BMRS_U(prior_log_odds=0.0), bits=[2, 8, 20])
    >>> curve.reduced.tolist(), curve.mixture.round(2).tolist()
    ([8, 8, 8], [0.29, 1.4, 5.91])

    Args:
        model, guide, model_args: as in `reduce`.
        criterion: `BMRS_N()` or `BMRS_U()`, for the structures of a network; or a mapping from sites of any Pyro
            program to functions that make a reduced prior of a value, a tensor without dimensions.
        prior_log_odds: per structure or element. None: the criterion's own; 0 for a mapping. Several values make it
            the parameter.
        parameter: one keyword with its values: a field of the criterion (scale, loc, bits, floor_bits),
            prior_log_odds, or, with a mapping, any name.

    Returns:
        A row per value, in nats. Columns: the parameter; log_evidence_change (ΔF of reducing everything); reduced (how
        many elements have ΔF + log-odds ≥ 0, each alone); chosen (ΔF of reducing those); mixture (log evidence, against
        the full model, of a model that reduces each element with prior probability π = sigmoid(log-odds)). The mixture
        is Σ log((1 - π) + π e^ΔF) over independent elements, and the sum over all combinations of elements in a joint
        normal; it is NaN where that has more than 12 elements. The data prefer the value with the largest `mixture`.

    Raises:
        TypeError: unless there is exactly one parameter, or for a criterion without evidence.
        ValueError: for values that are not allowed, naming them; as in `reduce`.
        NotImplementedError: where there is no closed form.
    """
    values_of = dict(parameter)
    if isinstance(prior_log_odds, Sequence | Tensor):
        values_of["prior_log_odds"], prior_log_odds = prior_log_odds, None
    if len(values_of) != 1:
        raise TypeError(
            "evidence_curve takes the values of one parameter, such as bits=[2, 4, 8]: got "
            f"{sorted(values_of) or 'none'}"
        )
    ((name, given),) = values_of.items()
    try:
        values = torch.as_tensor(given, dtype=torch.float64).flatten()
    except (TypeError, ValueError):
        values = torch.empty(0)
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite values, at least one: got {given!r}")
    log_odds = prior_log_odds
    if isinstance(criterion, EvidenceCriterion):
        log_odds = criterion.prior_log_odds if log_odds is None else log_odds
        alone = _of_structures(model, guide, criterion, model_args, name, values)
        parts: list[_Independent | _Joint] = [_Independent(alone.expand(len(values), -1))]
    elif isinstance(criterion, Mapping):
        log_odds = 0.0 if log_odds is None else log_odds
        parts = _of_latents(model, guide, criterion, model_args, name, values)
    else:
        raise TypeError(f"criterion must be BMRS_N(), BMRS_U() or a mapping of sites: got {criterion!r}")
    each = values if name == "prior_log_odds" else torch.full_like(values, log_odds)
    rows = []
    for part in parts:
        odds = each.unsqueeze(-1).to(part.alone.device)
        better = part.alone + odds >= 0
        whole, chosen, mixture = part.together(better, odds)
        rows.append((whole, better.sum(-1), chosen, mixture))
    names = ("log_evidence_change", "reduced", "chosen", "mixture")
    columns = {
        key: torch.stack(column).sum(0).cpu().numpy()
        for key, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    return pd.DataFrame({name: values.numpy(), **columns})


@torch.no_grad()
def _of_structures(
    model: Any, guide: Any, criterion: EvidenceCriterion, args: tuple[Any, ...], name: str, values: Tensor
) -> Tensor:
    """ΔF of each structure that the network has. Shape: (values or 1, structures)."""
    check(
        isinstance(model, nn.Module), "model", "a torch.nn.Module to have structures", type(model), TypeError
    )
    posteriors = [*posteriors_of(model, guide, arguments_of(guide, args)).values()]
    layers = noise_layers(model).values()
    prior = joined([prior_of(layer) for layer in layers], [q.batch_shape for q in posteriors])
    given = {}
    if name != "prior_log_odds":
        for value in values.tolist():
            _check_field(criterion, name, value)
        given[name] = values.to(prior.log_low.device).unsqueeze(-1)
    change = log_evidence_change(joined(posteriors), prior, criterion.reduced_prior(prior, **given))
    return change[..., torch.cat([layer.kept for layer in layers])]


def _check_field(criterion: EvidenceCriterion, name: str, value: float) -> None:
    """Raise unless the criterion has this field and takes this value."""
    assert is_dataclass(criterion)
    allowed = [field.name for field in fields(criterion)]
    if name not in allowed:
        raise TypeError(f"{type(criterion).__name__} has the parameters {', '.join(allowed)}: got {name!r}")
    replace(criterion, **{name: value})  # which checks it


# Of up to so many elements in a joint normal, all combinations are summed at each value.
_MOST_EXACT = 12


@dataclass(frozen=True)
class _Independent:
    """Elements that are independent of each other; `alone` as in `_Joint`."""

    alone: Tensor

    def together(self, better: Tensor, odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in `_Joint`."""
        # log(1 - π) = -softplus(odds), log π + ΔF = odds - softplus(odds) + ΔF
        mixture = (softplus(self.alone + odds) - softplus(odds)).sum(-1)
        return self.alone.sum(-1), torch.where(better, self.alone, 0.0).sum(-1), mixture


class _Joint:
    """Elements in one joint normal, whose ΔF depend on each other.

    Args:
        block: that joint normal.
        groups: each element as a group of its coordinates, under the reduced prior of each value.
        alone: ΔF of each element alone. Shape: (values, elements).
    """

    def __init__(self, block: JointNormalBlock, groups: list[list[GroupReduction]], alone: Tensor) -> None:
        self.block, self.groups, self.alone = block, groups, alone

    def together(self, better: Tensor, odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ΔF of all, ΔF of those that are better reduced, and the mixture. Shapes: (values,).

        Args:
            better: which elements are. Shape: (values, elements).
            odds: prior log-odds. Shape: (values, 1).
        """
        rows = [self._at(*given) for given in zip(self.groups, better, odds, strict=True)]
        whole, chosen, mixture = (torch.stack(column) for column in zip(*rows, strict=True))
        return whole, chosen, mixture

    def _at(
        self, groups: list[GroupReduction], better: Tensor, odds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self._change([group for group, taken in zip(groups, better.tolist(), strict=True) if taken])
        if len(groups) > _MOST_EXACT:
            return self._change(groups), chosen, torch.full_like(chosen, math.nan)
        coordinates, own = by_themselves(groups)
        models = all_subsets(self.block.loc[coordinates], self.block.covariance(coordinates), own)
        numbers = torch.arange(len(models), device=models.device)
        counts = torch.stack([numbers >> bit & 1 for bit in range(len(groups))]).sum(0)
        mixture = (models + counts * odds).logsumexp(0) - len(groups) * softplus(odds).squeeze()
        return models[-1], chosen, mixture

    def _change(self, groups: list[GroupReduction]) -> Tensor:
        if not groups:
            return torch.zeros((), dtype=torch.float64)
        group = as_one(groups)
        own = group.coordinates
        return group.change(self.block.loc[own], self.block.covariance(own)).log_evidence_change


def _made(site: str, make: Callable[[Tensor], Distribution], name: str, value: Tensor) -> Distribution:
    try:
        return make(value)
    except ValueError as error:
        raise ValueError(
            f"criterion must make a reduced prior of {site!r} with {name} {float(value):g}: {error}"
        ) from None


def _reduced_prior(site: LatentSite, reduced: Any) -> Any:
    """Of the elements of a site."""
    return per_element(elementary_law(site.name, reduced), site.shape, site.event_dim, site.value_shape)


def _groups_of(site: LatentSite, reduced: Any) -> list[GroupReduction]:
    """Each element of a site as a group of its coordinates, under a reduced prior."""
    at_value = replace(site, reduced_prior=_reduced_prior(site, reduced))
    single = torch.eye(site.shape.numel(), dtype=torch.bool, device=site.kept.device)
    masks = [mask.reshape(site.shape) for mask, kept in zip(single, site.kept.flatten(), strict=True) if kept]
    return [group_of(at_value, mask, site.prior) for mask in masks]


def _of_latents(
    model: Any,
    guide: Any,
    criterion: Mapping[str, Callable[[Tensor], Distribution]],
    args: tuple[Any, ...],
    name: str,
    values: Tensor,
) -> list[_Independent | _Joint]:
    """The elements of the sites, in parts that are independent of each other."""
    for key, make in criterion.items():
        if not callable(make) or isinstance(make, Distribution):
            raise TypeError(f"criterion must map {key!r} to a function of values of {name}: got {make!r}")
    laws = {key: [_made(key, make, name, value) for value in values] for key, make in criterion.items()}
    first = {key: several[0] for key, several in laws.items()}
    latents = Latents(model, guide, first, args, dependent_priors="average")
    alone: dict[str, Tensor] = {}
    with torch.no_grad():
        for site in latents.sites.values():
            if site.parents:
                raise NotImplementedError(
                    f"no curve of {site.name!r}, whose prior depends on {', '.join(site.parents)}"
                )
            several = [
                log_evidence_change(site.posterior, site.prior, _reduced_prior(site, law))
                for law in laws[site.name]
            ]
            alone[site.name] = torch.stack([change[site.kept] for change in several])
        parts: list[_Independent | _Joint] = []
        whole = {name: site.kept for name, site in latents.sites.items()}
        for block, masks in latents.by_block(whole):
            changes = torch.cat([alone[name] for name in masks], -1)
            if not isinstance(block, JointNormalBlock):
                parts.append(_Independent(changes))
                continue
            groups = [
                [group for name in masks for group in _groups_of(latents.sites[name], laws[name][number])]
                for number in range(len(values))
            ]
            parts.append(_Joint(block, groups, changes))
    return parts
