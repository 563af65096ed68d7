"""The reduction of any Pyro program's latents, from reduced priors to a `ProgramPlan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyro_bmrs.arguments import check, is_number
from pyro_bmrs.programs.latents import Evidence, Latents
from pyro_bmrs.programs.plan import ProgramPlan
from pyro_bmrs.programs.sites import LatentSite, Selection
from pyro_bmrs.pruning.criteria import reduced_priors_text
from pyro_bmrs.pruning.plan import COLUMNS, ESTIMATE_COLUMNS
from pyro_bmrs.pruning.reduce import kl_weight_of
from pyro_bmrs.pruning.rule import Rule

# Of a site, the elements of a group: a number, several, a slice, a bool tensor of its shape, or ... for all.
Elements = int | Sequence[int] | slice | Tensor | Any
Groups = Mapping[str, Mapping[str, Elements]]


class NonFiniteEvidenceError(ArithmeticError):
    """ΔF of an element is NaN or infinite: nothing can be decided about it."""


def reduce_latents(
    latents: Latents, *, groups: Groups | None, prior_log_odds: float, kl_weight: float | None
) -> ProgramPlan:
    """The plan that reduces each element with ΔF + log-odds ≥ 0; with ΔF of each site and each group."""
    chosen = selections(latents, groups)
    kl_weight = kl_weight_of(latents.guide, kl_weight)
    frames = [
        _rows(site, latents.elements[name], prior_log_odds, kl_weight, latents.draws)
        for name, site in latents.sites.items()
    ]
    undecided = ProgramPlan(
        table=pd.concat(frames, ignore_index=True),
        rule=Rule(
            criterion=reduced_priors_text(latents.sites), prior_log_odds=prior_log_odds, min_kept=0,
            kl_weight=kl_weight,
        ),
        **evidence_tables(latents, chosen),
        _latents=latents,
    )  # fmt: skip
    return undecided.at(0.0)


def evidence_tables(latents: Latents, groups: Mapping[str, Selection]) -> dict[str, Any]:
    """The tables `sites` and `groups` of a plan; the second is None where there are no groups."""

    def table(kind: str, selections: Mapping[str, Selection]) -> pd.DataFrame:
        rows = []
        for name, selection in selections.items():
            elements = sum(int(mask.sum()) for mask in selection.values())
            evidence = {part: float(value) for part, value in latents.change(selection)._asdict().items()}
            rows.append({kind: name, "elements": elements, **evidence})
        return pd.DataFrame(rows)

    sites = table("site", {name: {name: site.kept} for name, site in latents.sites.items()})
    return {"sites": sites, "groups": table("group", groups) if groups else None}


def _rows(
    site: LatentSite, evidence: Evidence, prior_log_odds: float, kl_weight: float, draws: int
) -> pd.DataFrame:
    change = evidence.log_evidence_change
    bad = torch.nonzero(~torch.isfinite(change).flatten()).flatten().tolist()
    if bad:
        raise NonFiniteEvidenceError(
            f"ΔF of elements {bad[:10]} of site {site.name!r} is not finite "
            f"({[float(change.flatten()[k]) for k in bad[:3]]})"
        )
    loc, scale = _parameters(site)
    mean, deviation = _moments(site, draws)
    columns = {
        "unit": site.units,
        "loc": loc,
        "scale": scale,
        "mean": mean,
        "snr": mean / deviation,
        "score": change + prior_log_odds,
        "log_evidence_change": change,
        "removed": torch.zeros_like(site.kept),
        "removed_in_fit": ~site.kept,
        "present": torch.ones_like(site.kept),
        "standard_error": evidence.standard_error,
        "khat": evidence.khat,
    }
    numbers = {name: value.flatten().cpu().numpy() for name, value in columns.items()}
    table = pd.DataFrame({"layer": site.name, **numbers, "kl_weight": kl_weight})
    return table[COLUMNS + ESTIMATE_COLUMNS]


def _parameters(site: LatentSite) -> tuple[Tensor, Tensor]:
    """Location and scale of each element's posterior, before any transformation; NaN for laws without them."""
    law: Any = site.posterior
    while isinstance(law, TransformedDistribution):
        law = law.base_dist
    loc, scale = (getattr(law, name, None) for name in ("loc", "scale"))
    return _of_elements(site, loc), _of_elements(site, scale)


def _of_elements(site: LatentSite, values: object) -> Tensor:
    """Values that have an entry for each element; NaN for others."""
    if isinstance(values, Tensor) and values.shape == site.shape:
        return values
    return torch.full(site.shape, math.nan, dtype=torch.float64)


def _moments(site: LatentSite, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each element, from draws where there is no formula; NaN for events."""
    if site.event_dim:
        return _of_elements(site, None), _of_elements(site, None)
    try:
        return site.posterior.mean, site.posterior.variance.sqrt()
    except (NotImplementedError, AttributeError):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            value = site.posterior.sample((draws,))
        return value.mean(0), value.std(0)


def selections(latents: Latents, groups: Groups | None) -> dict[str, Selection]:
    """Named groups as bool tensors over the elements of each site.

    Raises:
        ValueError, TypeError: naming the group, the site and what is allowed.
    """
    chosen: dict[str, Selection] = {}
    groups = {} if groups is None else groups
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must map names to {{site: elements}}: got {groups!r}")
    for group, members in groups.items():
        if not isinstance(members, Mapping) or not members:
            raise TypeError(
                f"groups must map {group!r} to a mapping of sites to elements, such as {{'weights': [0, 1]}}: got "
                f"{members!r}"
            )
        unknown = [name for name in members if name not in latents.sites]
        if unknown:
            raise ValueError(f"groups must name sites of {list(latents.sites)}: {group!r} has {unknown}")
        chosen[group] = {
            name: _mask(group, latents.sites[name], elements) for name, elements in members.items()
        }
    return chosen


def _mask(group: str, site: LatentSite, elements: Elements) -> Tensor:
    count = int(site.units.max()) + 1
    device = site.kept.device
    if isinstance(elements, Tensor) and elements.dtype == torch.bool:
        if elements.shape != site.shape:
            raise ValueError(
                f"groups must give a mask of the shape {tuple(site.shape)} of {site.name!r}: {group!r} has "
                f"{tuple(elements.shape)}"
            )
        return elements.to(device)
    if isinstance(elements, Tensor) and not elements.is_floating_point():
        elements = elements.flatten().tolist()
    try:
        if isinstance(elements, bool) or (
            isinstance(elements, Sequence) and not all(type(number) is int for number in elements)
        ):
            raise TypeError
        numbers = torch.arange(count)[
            elements if isinstance(elements, slice | type(...) | int) else list(elements)
        ]
    except (IndexError, TypeError):
        raise ValueError(
            f"groups must give numbers below {count}, a slice, a bool tensor, or ... for elements of {site.name!r}: "
            f"{group!r} has {elements!r}"
        ) from None
    if isinstance(elements, slice) and not len(numbers):
        raise ValueError(f"groups must give elements of {site.name!r}: {group!r} has none with {elements!r}")
    return torch.isin(site.units, numbers.to(device)).reshape(site.shape)


def check_log_odds(prior_log_odds: object) -> float:
    """The number, or ValueError."""
    check(is_number(prior_log_odds), "prior_log_odds", "a finite number", prior_log_odds)
    return float(prior_log_odds)  # type: ignore[arg-type]
