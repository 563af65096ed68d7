"""ΔF as a function of the reduced prior: which one do the data prefer?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import softplus

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.evidence import log_evidence_change
from pyro_bmrs.inference.guides import AutoTruncatedLogNormal, elementary, read_posterior
from pyro_bmrs.inference.posteriors import JointNormalBlock
from pyro_bmrs.networks.noise import noise_layers
from pyro_bmrs.reduction.criteria import EvidenceCriterion, joined, joined_priors
from pyro_bmrs.reduction.latent_sites import LatentSite, per_element
from pyro_bmrs.reduction.latents import Latents

CURVE_COLUMNS = ["log_evidence_change", "reduced", "chosen", "mixture"]


def evidence_curve(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    criterion: EvidenceCriterion | Mapping[str, Callable[[Tensor], Distribution]],
    *model_args: Any,
    prior_log_odds: float | None = None,
    **parameter: Sequence[float] | Tensor,
) -> pd.DataFrame:
    """The evidence for many values of one parameter of the reduced prior, in one vectorised call.

    >>> import torch
    >>> from torch import nn
    >>> import pyro_bmrs as bmrs
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    >>> model = bmrs.Classifier(net)
    >>> guide = bmrs.AutoTruncatedLogNormal(model, init_loc=-18.0, init_scale=2.0)
    >>> _ = guide(torch.randn(16, 4), torch.zeros(16, dtype=torch.long))
    >>> curve = evidence_curve(model, guide, bmrs.BMRS_U(), bits=[2, 8, 20])
    >>> curve.reduced.tolist(), curve.mixture.round(2).tolist()
    ([8, 8, 8], [0.29, 1.4, 5.91])

    Args:
        model, guide, model_args: as in `reduce`.
        criterion: `BMRS_N()` or `BMRS_U()`, for the structures of a network; or a mapping from sites of any Pyro
            program to functions that make a reduced prior of a tensor of values.
        prior_log_odds: per structure or element; None: the criterion's own, 0 for a mapping. Or given as the
            parameter below.
        parameter: one keyword with its values: a field of the criterion (scale, loc, bits, floor_bits),
            prior_log_odds, or, with a mapping, any name.

    Returns:
        A row per value, in nats: the parameter, log_evidence_change (ΔF of reducing everything), reduced (how many
        elements have ΔF + log-odds ≥ 0), chosen (sum of the ΔF of those), mixture (Σ log((1 - π) + π e^ΔF), π = the
        prior probability that the log-odds stand for: the evidence of the model in which each element may be
        reduced, against the full one). The value with the largest `mixture` is the one that the data prefer.

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
    values = torch.as_tensor(given, dtype=torch.float64).flatten()
    if not len(values) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite values, at least one: got {given!r}")
    log_odds = prior_log_odds
    if isinstance(criterion, EvidenceCriterion):
        log_odds = criterion.prior_log_odds if log_odds is None else log_odds
        changes = _of_structures(model, guide, criterion, model_args, name, values)
        whole = changes.sum(-1)
    elif isinstance(criterion, Mapping):
        log_odds = 0.0 if log_odds is None else log_odds
        changes, whole = _of_latents(model, guide, criterion, model_args, name, values)
    else:
        raise TypeError(f"criterion must be BMRS_N(), BMRS_U() or a mapping of sites: got {criterion!r}")
    odds = values.unsqueeze(-1) if name == "prior_log_odds" else torch.tensor(log_odds, dtype=torch.float64)
    columns = {
        name: values,
        "log_evidence_change": whole.expand(len(values)),
        "reduced": (changes + odds >= 0).sum(-1),
        "chosen": torch.where(changes + odds >= 0, changes, 0.0).sum(-1),
        # log(1 - π) = -softplus(odds), log π + ΔF = odds - softplus(odds) + ΔF
        "mixture": (softplus(changes + odds) - softplus(odds)).sum(-1),
    }
    return pd.DataFrame({key: column.expand(len(values)).cpu().numpy() for key, column in columns.items()})


@torch.no_grad()
def _of_structures(
    model: Any, guide: Any, criterion: EvidenceCriterion, args: tuple[Any, ...], name: str, values: Tensor
) -> Tensor:
    """ΔF of each structure that the network has. Shape: (values or 1, structures)."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module to have structures: got {type(model).__name__}")
    arguments = args or (guide.example_arguments if isinstance(guide, AutoTruncatedLogNormal) else ())
    posteriors, priors = [], []
    found = read_posterior(guide, *arguments)
    for site, layer in noise_layers(model).items():
        if site not in found:
            raise ValueError(f"guide must have a truncated log-normal posterior of {site!r}: it has none")
        q, p, kept = found[site], elementary(layer.prior()), layer.kept
        assert isinstance(p, LogUniform | TruncatedLogNormal)
        posteriors.append(
            TruncatedLogNormal(
                *(t[kept] for t in (q.loc, q.scale, q.log_low, q.log_high)), validate_args=False
            )
        )
        priors.append(p)
    prior = joined_priors(priors, [q.batch_shape for q in posteriors])
    given = {}
    if name != "prior_log_odds":
        for value in values.tolist():
            _check_field(criterion, name, value)
        given[name] = values.to(prior.log_low.device).unsqueeze(-1)
    return log_evidence_change(joined(posteriors), prior, criterion.reduced_prior(prior, **given))


def _check_field(criterion: EvidenceCriterion, name: str, value: float) -> None:
    """Raise unless the criterion has this field and takes this value."""
    from dataclasses import fields, is_dataclass
    from dataclasses import replace as changed

    assert is_dataclass(criterion)
    allowed = [field.name for field in fields(criterion)]
    if name not in allowed:
        raise TypeError(f"{type(criterion).__name__} has the parameters {', '.join(allowed)}: got {name!r}")
    changed(criterion, **{name: value})


def _of_latents(
    model: Any,
    guide: Any,
    criterion: Mapping[str, Callable[[Tensor], Distribution]],
    args: tuple[Any, ...],
    name: str,
    values: Tensor,
) -> tuple[Tensor, Tensor]:
    """ΔF of each element, (values, elements), and of reducing all, (values,)."""
    for key, make in criterion.items():
        if not callable(make):
            raise TypeError(f"criterion must map {key!r} to a function of values of {name}: got {make!r}")
    first = {key: make(values[0]) for key, make in criterion.items()}
    latents = Latents(model, guide, first, args)
    changes, whole = [], torch.zeros(len(values), dtype=torch.float64)
    with torch.no_grad():
        for site in latents.sites.values():
            if site.parents:
                raise NotImplementedError(
                    f"the prior of {site.name!r} depends on {list(site.parents)}: no curve of it"
                )
            spread = values.reshape(-1, *(1 for _ in range(len(site.shape) + site.event_dim)))
            reduced = _wide(criterion[site.name](spread), site, len(values))
            change = torch.where(
                site.kept, log_evidence_change(site.posterior, site.prior, reduced), -math.inf
            )
            change = change.reshape(len(values), -1)
            changes.append(change[:, site.kept.flatten()])
            whole = whole + _of_whole_site(site, reduced, changes[-1])
    return torch.cat(changes, -1), whole


def _wide(law: Any, site: LatentSite, points: int) -> Any:
    """A reduced prior of many values as one of elements. Batch shape: (values, *elements)."""
    return per_element(elementary(law), torch.Size((points, *site.shape)), site.event_dim)


def _of_whole_site(site: LatentSite, reduced: Any, changes: Tensor) -> Tensor:
    """ΔF of reducing all of a site at once. Shape: (values,)."""
    block = site.block
    if not isinstance(block, JointNormalBlock):
        return changes.sum(-1)
    own = site.coordinates.flatten()
    laws = (site.prior, reduced)
    if site.event_dim or not all(isinstance(law, torch.distributions.Normal) for law in laws):
        raise NotImplementedError(f"{site.name!r} has no closed form in its joint normal: no curve of it")
    import pyro.distributions as dist

    joint = dist.MultivariateNormal(
        block.loc[own], covariance_matrix=block.covariance(own), validate_args=False
    )
    flat_prior = dist.Normal(site.prior.loc.flatten(), site.prior.scale.flatten()).to_event(1)
    flat_reduced = dist.Normal(reduced.loc.flatten(1), reduced.scale.flatten(1)).to_event(1)
    return log_evidence_change(joint, flat_prior, flat_reduced)
